"""what the user writes about classes -> labels, names and regions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softdice.validation import package


class ScoreError(ValueError):
    """A folder, an option or a pair of files that cannot be scored, and why, in one line."""


@dataclass(frozen=True)
class Options:
    """What is compared, and how; the same for every pair.

    Args:
        labels: the labels that are scored; None for every label that occurs, without `ignore` and the background.
        names: label -> name, where known.
        regions: name -> labels that count as one class; then the regions are scored instead of the labels.
        ignore: voxels where the reference has one of these labels are left out.
        include_background: score label 0 too.
        threshold: a voxel of a float prediction is in the class where its value is larger.
        soft: a float prediction counts with its probability: soft Dice, 2 sum(p t) / (sum(p) + sum(t)).
        resample: a prediction on another grid is brought to the grid of the reference, by its affine.
        ignore_geometry: voxels are compared by position whatever the affines say.
    """

    labels: tuple[int, ...] | None = None
    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] | None = None
    ignore: tuple[int, ...] = ()
    include_background: bool = False
    threshold: float | None = None
    soft: bool = False
    resample: bool = False
    ignore_geometry: bool = False

    @property
    def keys(self) -> tuple[int | str, ...] | None:
        """The classes where they are known beforehand; a label that is ignored is none."""
        if self.regions is not None:
            return tuple(self.regions)
        return None if self.labels is None else tuple(label for label in self.labels if label not in self.ignore)


def parse_options(labels: str | None, regions: str | None, ignore: str | None, **others: Any) -> Options:
    """texts of --labels, --regions and --ignore, the other options by name -> Options.

    Raises:
        ScoreError: a text that cannot be understood, or options that exclude each other.
    """
    if others["soft"] and others["threshold"] is not None:
        raise ScoreError("score: expected --soft or --threshold, got both. Pass one of them.")
    if others["resample"] and others["ignore_geometry"]:
        raise ScoreError("score: expected --resample or --ignore-geometry, got both. Pass one of them.")
    if others["resample"]:
        package("--resample", "scipy", "score")
    numbers, names, unions = parse_labels(labels) if labels else (None, {}, {})
    if regions:
        unions = parse_regions(regions)
    elif unions:  # a dataset.json with regions, as nnU-Net trains and scores them
        unions = {**{names[label]: (label,) for label in numbers or ()}, **unions}
    if (others["soft"] or others["threshold"] is not None) and len(unions or numbers or (1,)) != 1:
        raise ScoreError("--soft, --threshold: expected one class, got several. Name one with --labels or --regions.")
    left_out = parse_numbers("--ignore", ignore) if ignore else ()
    return Options(numbers, names, unions or None, left_out, **others)


def parse_labels(text: str) -> tuple[tuple[int, ...], dict[int, str], dict[str, tuple[int, ...]]]:
    """text or JSON file -> labels, their names, and regions (entries that are several labels).

    Example:
        >>> parse_labels("1,2,5")
        ((1, 2, 5), {}, {})
        >>> parse_labels("liver=1, tumour=2")
        ((1, 2), {1: 'liver', 2: 'tumour'}, {})

    A file is JSON as nnU-Net's dataset.json has it, {"labels": {"background": 0, "liver": 1, "both": [1, 2]}}, as the
    Medical Segmentation Decathlon has it, {"labels": {"0": "background"}}, or the inner object alone. The background
    gives its name but is not among the labels that are returned from a file.
    """
    path = Path(text)
    if path.suffix == ".json":
        entries = _entries(_json(path))
        numbers = {name: value for name, value in entries.items() if len(value) == 1}
        names = {value[0]: name for name, value in numbers.items()}
        regions = {name: value for name, value in entries.items() if len(value) > 1}
        return tuple(sorted(label for label in names if label != 0)), names, regions
    labels, names = [], {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(?:(.+?)\s*=\s*)?(-?\d+)", part)
        if match is None:
            raise ScoreError(f"--labels: expected numbers, name=number or a .json file, got {part!r}. Example: 1,2,5")
        labels.append(int(match[2]))
        if match[1]:
            names[int(match[2])] = match[1]
    if not labels:
        raise ScoreError(f"--labels: expected at least one label, got {text!r}. Example: 1,2,5")
    return tuple(dict.fromkeys(labels)), names, {}


def parse_regions(text: str) -> dict[str, tuple[int, ...]]:
    """text or JSON file -> name -> labels.

    Example:
        >>> parse_regions("whole=1,2,4; core=1,4")
        {'whole': (1, 2, 4), 'core': (1, 4)}
    """
    path = Path(text)
    if path.suffix == ".json":
        return _entries(_json(path))
    regions = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"(.+?)\s*=\s*(-?\d+(?:\s*,\s*-?\d+)*)", part)
        if match is None:
            raise ScoreError(f"--regions: expected name=labels or a .json file, got {part!r}. Example: whole=1,2,4")
        regions[match[1]] = tuple(int(number) for number in match[2].split(","))
    if not regions:
        raise ScoreError(f"--regions: expected at least one region, got {text!r}. Example: whole=1,2,4; core=1,4")
    return regions


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """text -> whole numbers.

    Example:
        >>> parse_numbers("--ignore", "255, -1")
        (255, -1)
    """
    if not re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        raise ScoreError(f"{option}: expected whole numbers, got {text!r}. Example: 255 or 254,255")
    return tuple(int(number) for number in text.split(","))


def _json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoreError(f"{path}: expected a JSON file with labels, got {' '.join(str(error).split())}.") from error
    return content["labels"] if isinstance(content, dict) and isinstance(content.get("labels"), dict) else content


def _entries(content: Any) -> dict[str, tuple[int, ...]]:
    """{"name": 1}, {"name": [1, 2]} or {"1": "name"} -> name -> labels."""
    entries: dict[str, tuple[int, ...]] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, str) and re.fullmatch(r"-?\d+", key):
            entries[value] = (int(key),)
            continue
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            entries[key] = tuple(numbers)
            continue
        wanted = '"name": number, "name": [numbers] or "number": "name"'
        raise ScoreError(f"labels: expected {wanted}, got {key!r}: {value!r}.")
    if not entries:
        raise ScoreError(f"labels: expected an object of names and labels, got {str(content)[:60]!r}.")
    return entries
