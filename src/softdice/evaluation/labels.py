"""What a user says about labels, in a text or in dataset.json: which are scored, their names, and their unions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ScoreError(ValueError):
    """A folder, an option or a pair of files that cannot be scored, and why, in one line."""


@dataclass(frozen=True)
class Labels:
    """What an option or a file says about labels.

    Args:
        labels: those that are scored, None for all. names: label -> name.
        regions: name -> labels, where one class has several; then regions are scored instead of labels.
        ignore: labels of voxels that nobody annotated.
    """

    labels: tuple[int, ...] | None = None
    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()


def parse_labels(text: str) -> Labels:
    """Read a text such as "1,2,5" or "liver=1, tumour=2", or a JSON file: the labels to score, and their names.

    Example:
        >>> parse_labels("1,2,5").labels
        (1, 2, 5)
        >>> parse_labels("liver=1, tumour=2").names
        {1: 'liver', 2: 'tumour'}

    A JSON file has the form of nnU-Net's dataset.json, {"labels": {"background": 0, "liver": 1, "ignore": 2}}, of the
    Medical Segmentation Decathlon, {"labels": {"0": "background"}}, or of the inner object alone. Its label 0 is not
    scored, and its label named `ignore` becomes `Labels.ignore`. If a class has several labels, `Labels.regions` holds
    all classes but the background. nnU-Net's regions_class_order has a number for each region.

    Raise ScoreError for another text or file, and for a regions_class_order of another length.
    """
    if Path(text).suffix == ".json":
        entries, order = _read_json(Path(text))
        ignore = entries.pop("ignore", ())
        if len(ignore) > 1:
            raise ScoreError(f"{text}: expected one number for 'ignore', got {list(ignore)}.")
        names = {labels[0]: name for name, labels in entries.items() if len(set(labels)) == 1}
        regions = {name: labels for name, labels in entries.items() if set(labels) != {0}}
        if len(names) == len(entries):
            regions = {}
        elif order is not None and len(order) != len(regions):
            got = f"{len(order)} for {len(regions)}: {', '.join(regions)}"
            raise ScoreError(f"{text}: expected as many numbers in regions_class_order as regions, got {got}.")
        return Labels(tuple(sorted(label for label in names if label != 0)), names, regions, ignore)
    pairs = named_values("--labels", text, ",", r"-?\d+", "numbers, name=number or a .json file", "1,2,5")
    numbers = tuple(dict.fromkeys(int(number) for _, number in pairs))
    return Labels(numbers, {int(number): name for name, number in pairs if name})


def parse_regions(text: str) -> dict[str, tuple[int, ...]]:
    """Read {name: labels} of regions from a text or a JSON file, without label 0 and `ignore` of a dataset.json.

    Raise ScoreError for another text or file.

    Example:
        >>> parse_regions("whole=1,2,4; core=1,4")
        {'whole': (1, 2, 4), 'core': (1, 4)}
    """
    if Path(text).suffix == ".json":
        entries, _ = _read_json(Path(text))
        return {name: value for name, value in entries.items() if name != "ignore" and value != (0,)}
    wanted, example = "name=labels or a .json file", "whole=1,2,4; core=1,4"
    pairs = named_values("--regions", text, ";", r"-?\d+(?:\s*,\s*-?\d+)*", wanted, example, bare=False)
    return {name: tuple(map(int, labels.split(","))) for name, labels in pairs}


def named_values(
    option: str, text: str, separator: str, value: str, wanted: str, example: str, *, bare: bool = True
) -> list[tuple[str, str]]:
    """Split the text of an option into pairs of name and value; "" is the name of a value without one.

    Args:
        option, wanted, example: its name, what it takes and an example, for the error. separator: between two pairs.
        value: regular expression of a value. bare: whether a value may stand without a name.

    Raises:
        ScoreError: there is no pair, a part has another form, or a name or a value stands twice.

    Example:
        >>> named_values("--labels", "1, liver=2", ",", r"[0-9]+", "numbers", "1,2")
        [('', '1'), ('liver', '2')]
    """
    pairs = []
    for part in filter(None, map(str.strip, text.split(separator))):
        match = re.fullmatch(rf"(?:(.+?)\s*=\s*){'?' if bare else ''}({value})", part)
        # the name must not hold a whole pair, as in "liver=1; tumour=2" with "," as the separator
        if match is None or re.search(rf"=\s*(?:{value})\s*[\s,;]", match[1] or ""):
            raise ScoreError(f"{option}: expected {wanted}, got {part!r}. Example: {example}")
        pairs.append((match[1] or "", match[2]))
    if not pairs:
        raise ScoreError(f"{option}: expected {wanted}, got {text!r}. Example: {example}")
    _check_distinct(option, [(name, value) for name, value in pairs if name])
    return pairs


def _check_distinct(source: str, entries: Sequence[tuple[str, str]]) -> None:
    """Raise ScoreError if two classes have one name, or one label has two: one of their scores would be lost.

    `source` is the option or the file; `entries` are name and label of each class, or its labels with commas.
    """
    for what, words in (
        ("names that differ", [name for name, _ in entries]),
        ("one name for each number", [value for _, value in entries if re.fullmatch(r"-?\d+", value)]),
    ):
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise ScoreError(f"{source}: expected {what}, got {twice!r} twice. Rename one, or leave it out.")


def _read_json(path: Path) -> tuple[dict[str, tuple[int, ...]], list[Any] | None]:
    """Return {name: labels} of {"name": 1}, {"name": [1, 2]} or {"1": "name"}, and the list regions_class_order.

    The list is None if the file has none. Raise ScoreError for a file that cannot be read, has another form, or has a
    name or a label twice.
    """
    try:  # utf-8-sig: Windows editors write a byte-order mark; _Pairs: a dict would drop a name that stands twice
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise ScoreError(f"{path}: expected a JSON file with labels, got {' '.join(str(error).split())}.") from error
    file = dict(content) if isinstance(content, _Pairs) else {}
    classes = file["labels"] if isinstance(file.get("labels"), _Pairs) else content
    entries = []
    for key, value in classes if isinstance(classes, _Pairs) else ():
        if isinstance(value, str) and re.fullmatch(r"-?\d+", key):
            entries.append((value, (int(key),)))
            continue
        labels = value if isinstance(value, list) else [value]
        if not labels or not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
            wanted = '"name": number, "name": [numbers] or "number": "name"'
            raise ScoreError(f"{path}: labels: expected {wanted}, got {key!r}: {value!r}.")
        entries.append((key, tuple(labels)))
    if not entries:
        raise ScoreError(f"{path}: labels: expected an object of names and labels, got {str(content)[:60]!r}.")
    _check_distinct(str(path), [(name, ",".join(map(str, labels))) for name, labels in entries])
    order = file.get("regions_class_order")
    return dict(entries), order if isinstance(order, list) else None


class _Pairs(list[tuple[str, Any]]):
    """An object of a JSON file as a list of pairs (name, value)."""
