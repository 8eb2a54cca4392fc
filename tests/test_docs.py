"""Every example that a user can read runs: docstrings, the README, the pages of docs/."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import softdice

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(softdice.__path__, "softdice.")
    if not module.name.endswith("__main__")  # importing it runs the command
)
NEEDS = {"softdice.compat.mmseg": "mmseg"}
"""Modules that stand in the registry of another library, and are imported beside it alone."""
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXCUSE = re.compile(r"<!-- not executed: ([^\n]*\S[^\n]*) -->\s*\Z")
"""In the line before a block: why it cannot run, for example because it needs two GPUs."""


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = importlib.import_module(name)
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_docstring_examples_exist() -> None:
    """The names that a user calls have an example each."""
    finder = doctest.DocTestFinder()
    for name in softdice.__all__:
        thing = getattr(softdice, name)
        if isinstance(thing, type) and issubclass(thing, torch.nn.Module):
            (own, *_) = finder.find(thing, name)
            assert own.examples, f"{name} has no example"


def blocks(page: Path) -> list[tuple[int, str]]:
    """Yield line and code of every Python block of a page that is meant to run."""
    text = page.read_text()
    return [
        (text[: match.start(1)].count("\n"), match.group(1))
        for match in FENCE.finditer(text)
        if EXCUSE.search(text[: match.start()]) is None
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {"__name__": "page"}
    for line, code in blocks(page):  # blocks of one page share their variables, as a reader would
        exec(compile("\n" * line + code, str(page), "exec"), variables)


def test_the_readme_has_examples() -> None:
    assert len(blocks(ROOT / "README.md")) >= 2
    assert len(blocks(ROOT / "docs" / "index.md")) >= 3


def navigation() -> list[str]:
    """Return the pages of all groups."""
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    groups = [place for entry in entries for place in entry.values()]
    single = [place for place in groups if isinstance(place, str)]
    return single + [page for place in groups if isinstance(place, list) for entry in place for page in entry.values()]


def test_the_navigation_has_every_page_once() -> None:
    files = [page for suffix in ("md", "ipynb") for page in (ROOT / "docs").rglob(f"*.{suffix}")]
    pages = sorted(str(page.relative_to(ROOT / "docs")) for page in files)
    assert sorted(navigation()) == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


CODE = [path for folder in ("src", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
NAMED = [*PAGES, ROOT / "CONTRIBUTING.md", *CODE]
"""Texts that name modules of the package: every page, and what is written in the code."""
MODULE = re.compile(r"(?<![\w./-])softdice(?:\.[A-Za-z_]\w*)+(?![\w/-])")
SOURCE = re.compile(r"(?<![\w./<-])(?:[\w-]+/)+[\w-]+\.pyi?\b")


COMMAND = "softdice.exe"
"""The one dotted name that is no module: the command on Windows."""


def exists(name: str) -> bool:
    """Return whether a dotted name leads to a module of the package, or to something in one."""
    place, parts = ROOT / "src" / "softdice", name.split(".")[1:]
    while parts and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").exists()):
        place /= parts.pop(0)
    if not parts:
        return True
    try:
        value: Any = importlib.import_module(".".join(place.relative_to(ROOT / "src").parts))
    except ModuleNotFoundError:  # it stands in another library, which is not here: its text must do
        return re.search(rf"\b{parts[0]}\b", place.with_suffix(".py").read_text()) is not None
    *parts, last = parts
    for part in parts:
        value = getattr(value, part, None)
    return hasattr(value, last) or last in getattr(value, "__annotations__", ())


@pytest.mark.parametrize("page", NAMED, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in MODULE.findall(text) if name != COMMAND and not exists(name)]
    if page.suffix == ".md":
        roots = (ROOT, ROOT / "src" / "softdice", page.parent)
        missing += [path for path in SOURCE.findall(text) if not any((root / path).exists() for root in roots)]
    assert not missing


@pytest.mark.parametrize("name", ["softdice.kernels", "softdice.statistics.no_such", "softdice.SoftDiceLoss.no_such"])
def test_a_module_that_is_gone_is_seen(name: str) -> None:
    assert MODULE.findall(f"see `{name}`.") == [name]
    assert not exists(name)
    assert SOURCE.findall("`src/softdice/kernels/cpu/driver.py`, `kernels/ops.py`") == [
        "src/softdice/kernels/cpu/driver.py",
        "kernels/ops.py",
    ]


def test_every_public_name_is_in_the_documentation() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in softdice.__all__:
        assert name == "__version__" or name in text, name


def test_every_shared_keyword_is_in_the_readme_table() -> None:
    from softdice.losses import LossSettings

    readme = (ROOT / "README.md").read_text()
    for keyword in LossSettings.__annotations__:
        assert f"| `{keyword}` |" in readme, keyword
