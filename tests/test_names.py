"""One word for one thing: all names of the package use the words of CONTRIBUTING's glossary."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import softdice
from softdice import metrics

PACKAGE = Path(softdice.__file__).parent
WITH_ARROWS = (
    "losses", "head", "compat", "metrics", "costs", "decisions", "functional", "indices", "reductions",
    "reproducibility",
)  # fmt: skip
"""Those with public functions of tensors, whose docstrings begin with an arrow."""

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
    "training": ("patch",),
    "cli": ("score", "metric", "penalty", "instance", "patch"),
}
"""Room -> words that are right in it. images: segments of 3D Slicer and DICOM, category and score of an annotation of
COCO. Scores of hard masks: a score is what is computed, a metric is one of torchmetrics or of --metrics, a penalty a
distance of --penalty, instances are objects of --instances, pixels those of a picture, an area that of a surface
element, a fixed point one of arithmetic. Training cuts patches, as the field calls them."""
PARTICIPLES = ("given", "found", "told")
"""Words that say that something happened to a thing, and not what it is."""
ALONE = (*PARTICIPLES, "own")
"""No name of their own; `own_class` says whose class it is, and is one."""
SCORE = {"score", "score_C"}
"""What an index returns, and a cost takes."""
KEPT: dict[str, set[str]] = {
    "losses": SCORE | {"JaccardMetricLoss"}, "costs": SCORE, "indices": {"jaccard_metric"}, "head": {"mode"},
    "__init__": {"_METRICS"},
    "compat": SCORE | {
        "squared_pred", "weight_mode", "gt", "cls_score", "mode", "y_pred", "BINARY_MODE", "MULTICLASS_MODE",
        "MULTILABEL_MODE", "MODES",
    },
}  # fmt: skip
"""Names that a room has all the same: public ones, torch's, and in `compat` those of the libraries it stands in for."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of every class, function, parameter, variable and attribute that the code defines."""
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
    """Return the words of a name in snake_case or CamelCase, in the singular."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return [part.removesuffix("s") if part.removesuffix("s") in SYNONYMS else part for part in parts]


def problem(name: str, terms: tuple[str, ...] = ()) -> str | None:
    """Return what is wrong with a name, or None; `terms` are words that a room has for other things."""
    if name.strip("_").lower() in ALONE:
        return f"{name} says nothing about the thing: name it with a noun"
    for word in words(name):
        if word in PARTICIPLES:
            return f"{name}: {word} says nothing about the thing"
        if word in SYNONYMS and word not in terms:
            return f"{name}: the glossary's word is {SYNONYMS[word]}"
    return None


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_use_the_words_of_the_glossary(path: Path) -> None:
    room = room_of(path)
    terms = TERMS.get(path.relative_to(PACKAGE).parts[0], ())
    wrong = [
        (line, text)
        for line, name in names(ast.parse(path.read_text()))
        if name not in KEPT.get(room, set()) and (text := problem(name, terms))
    ]
    assert not wrong, "\n".join(f"{path.name}:{line}: {text}" for line, text in sorted(wrong))


PUBLIC = {*softdice.__all__, *softdice.losses.__all__, *softdice.functional.__all__, *metrics.__all__}
WHOLLY_PUBLIC = ("costs", "indices", "reductions", "monai", "nnunet", "smp", "mmseg")
"""Modules of which users may call whatever has no underscore."""


def definitions(body: list[ast.stmt], path: Path, owner: bool | None = None) -> Iterator[tuple[ast.AST, str, bool]]:
    """Yield every class and function, the first line of its docstring, and whether users call it.

    owner: whether users call the class that the body belongs to; None for a module.
    """
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if owner is None:
                public = node.name in PUBLIC or (path.stem in WHOLLY_PUBLIC and not node.name.startswith("_"))
            else:
                public = node.name == "forward" or (owner and node.name == "logits")
            yield node, (ast.get_docstring(node) or "").partition("\n")[0], public
            yield from definitions(node.body, path, public)


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_open_with_a_verb_and_no_arrow(path: Path) -> None:
    """But for the public functions of tensors, where the arrow says what they make of what."""
    arrows = room_of(path) in WITH_ARROWS
    lines = definitions(ast.parse(path.read_text()).body, path)
    wrong = [(node.lineno, text) for node, text, public in lines if "->" in text and not (arrows and public)]  # type: ignore[attr-defined]
    assert not wrong, "\n".join(f"{path.name}:{line}: say what it does: {text}" for line, text in wrong)


LIST_ID = re.compile(r"\b[GSTF]\d{1,2}\b")
REAL_WORDS = re.compile(r"F1 score|the F1 of|T1 template")
"""F1 is a score, and T1 a way to weight magnetic resonance."""


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every comment, and of every string that stands alone, as a docstring does."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for offset, line in enumerate(node.value.value.splitlines()):
                yield node.lineno + offset, line


def list_ids(text: str) -> list[tuple[int, str]]:
    return [(n, name) for n, line in prose(text) for name in LIST_ID.findall(REAL_WORDS.sub("", line))]


def test_no_comment_or_docstring_cites_an_id_of_a_list_that_is_not_here() -> None:
    """A reader cannot look it up; what is meant is said in words."""
    root = PACKAGE.parent.parent
    found = {path: list_ids(path.read_text()) for room in ("src", "tests") for path in (root / room).rglob("*.py")}
    found = {path: ids for path, ids in found.items() if ids and path != Path(__file__)}
    assert not found, found


def test_an_id_of_a_list_is_seen() -> None:
    code = 'x = "S18"  # as S4 says\ndef f():\n    """As of G4 and S2, the F1 score.\n\n    F3."""\n'
    assert list_ids(code) == [(1, "S4"), (3, "G4"), (3, "S2"), (5, "F3")]


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
    """Return the words of the table in CONTRIBUTING with their meanings."""
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
