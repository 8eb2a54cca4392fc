"""One word for one thing: the rooms that are clean use the words of CONTRIBUTING's glossary in their names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import softdice
from softdice import metrics

PACKAGE = Path(softdice.__file__).parent
ROOMS = (
    "statistics", "backends", "parallel", "images", "metrics", "evaluation", "scoring", "internals.py", "validation.py",
    "cli/app.py", "cli/check.py", "cli/errors.py", "cli/score.py", "cli/score_run.py",
)  # fmt: skip
"""Folders and modules of the package whose names are held to the glossary."""

SYNONYMS = {
    "specimen": "sample", "instance": "sample", "category": "class", "pixel": "voxel", "point": "voxel",
    "area": "region", "superclass": "region", "slab": "chunk", "segment": "chunk", "patch": "tile", "brick": "tile",
    "flavour": "kind", "mode": "kind", "query": "request", "fieldset": "bundle", "moment": "statistic",
    "quantity": "statistic", "metric": "index", "score": "index", "penalty": "cost", "criterion": "loss",
    "guess": "prediction", "pred": "prediction", "predicted": "prediction", "gt": "target", "groundtruth": "target",
    "subject": "case", "couple": "pair", "duo": "pair",
}  # fmt: skip
"""A word that no name holds -> the glossary's word for the same thing."""
TERMS = {
    "images": ("segment", "score", "category"),
    "metrics": ("score", "metric", "penalty", "area", "point"),
    "evaluation": ("score", "metric"),
    "scoring": ("score", "metric", "penalty", "instance", "pixel"),
    "cli": ("score", "metric", "penalty", "instance"),
}
"""Room -> words that are right in it. images: segments of 3D Slicer and DICOM, category and score of an annotation of
COCO. Scores of hard masks: a score is what is computed, a metric is one of torchmetrics or of --metrics, a penalty a
distance of --penalty, instances are objects of --instances, pixels those of a picture, an area that of a surface
element, a fixed point one of arithmetic."""
PARTICIPLES = ("given", "found", "told")
"""Words that say that something happened to a thing, and not what it is."""
ALONE = (*PARTICIPLES, "own")
"""No name of their own; `own_class` says whose class it is, and is one."""


def rooms() -> list[Path]:
    paths = [PACKAGE / room for room in ROOMS]
    return sorted(path for room in paths for path in ([room] if room.suffix else room.rglob("*.py")))


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every class, function, parameter, variable and attribute that the code defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname is not None:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            yield node.lineno, node.name


def words(name: str) -> list[str]:
    """snake_case or CamelCase -> its words, in the singular."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return [part.removesuffix("s") if part.removesuffix("s") in SYNONYMS else part for part in parts]


def problem(name: str, room: str = "") -> str | None:
    """What is wrong with a name in a room, or None."""
    if name.strip("_").lower() in ALONE:
        return f"{name} says nothing about the thing: name it with a noun"
    for word in words(name):
        if word in PARTICIPLES:
            return f"{name}: {word} says nothing about the thing"
        if word in SYNONYMS and word not in TERMS.get(room, ()):
            return f"{name}: the glossary's word is {SYNONYMS[word]}"
    return None


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_use_the_words_of_the_glossary(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    wrong = [(line, text) for line, name in names(ast.parse(path.read_text())) if (text := problem(name, room))]
    assert not wrong, "\n".join(f"{path.name}:{line}: {text}" for line, text in sorted(wrong))


PUBLIC = {*softdice.__all__, *metrics.__all__}
"""Names of functions and classes of tensors that users call: their docstrings may open with an arrow of shapes."""


def first_lines(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line, and first line of the docstring, of every class and function that is not public."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in PUBLIC:
            yield node.lineno, (ast.get_docstring(node) or "").partition("\n")[0]


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_open_with_a_verb_and_no_arrow(path: Path) -> None:
    wrong = [(line, text) for line, text in first_lines(ast.parse(path.read_text())) if "->" in text]
    assert not wrong, "\n".join(f"{path.name}:{line}: say what it does: {text}" for line, text in wrong)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def read_pixels(): pass", "read_pixels: the glossary's word is voxel"),
        ("class PatchWalk: pass", "PatchWalk: the glossary's word is tile"),
        ("def f(*, pred): pass", "pred: the glossary's word is prediction"),
        ("for _metrics in (): pass", "_metrics: the glossary's word is index"),
        ("self.found = 1", "found says nothing about the thing: name it with a noun"),
        ("def f(**given): pass", "given says nothing about the thing: name it with a noun"),
        ("with a as (own, b): pass", "own says nothing about the thing: name it with a noun"),
        ("[x for told_value in y]", "told_value: told says nothing about the thing"),
    ],
)
def test_a_wrong_name_is_seen(code: str, expected: str) -> None:
    assert [problem(name) for _, name in names(ast.parse(code)) if problem(name)] == [expected]


def test_a_right_name_passes() -> None:
    code = "own_class = foundation = modest = index_BC = scoreboard = 1\ndef arearange(): pass"
    assert [name for _, name in names(ast.parse(code)) if problem(name)] == []


def glossary() -> dict[str, str]:
    """Word -> its meaning, from the table of CONTRIBUTING."""
    text = (PACKAGE.parent.parent / "CONTRIBUTING.md").read_text()
    table = re.search(r"^## Glossary\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert table is not None, "CONTRIBUTING has no section Glossary"
    return dict(re.findall(r"^\| \*\*([^*]+)\*\* \| (.+) \|$", table.group(1), re.MULTILINE))


def test_the_glossary_holds_the_words_that_names_are_sent_to() -> None:
    meanings = glossary()
    known = {word for entry in meanings for word in re.split(r", | ", entry)} | {"target"}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & set(meanings), "a word cannot be an entry and a synonym"
    assert 18 <= len(meanings) <= 30


def test_the_rooms_exist() -> None:
    assert all((PACKAGE / room).exists() for room in ROOMS)
