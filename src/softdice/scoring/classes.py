"""what the user writes about classes -> labels, names and regions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softdice.metrics.lesions import CHALLENGES, Reach, Rule
from softdice.validation import package


class ScoreError(ValueError):
    """A folder, an option or a pair of files that cannot be scored, and why, in one line."""


METRICS = {
    "precision": ("precision",),
    "recall": ("recall",),
    "specificity": ("specificity",),
    "volume": ("ml_pred", "ml_ref", "volume_difference"),
    "surface": ("hd95", "mean_distance", "surface_dice"),
    "lesions": ("lesion_dice", "pq", "sq", "rq"),
    "centreline": ("centreline_dice",),
    "instances": ("pq", "sq", "rq", "ap50", "ap75", "ap90", "matched", "missed", "extra"),
}
"""What may be asked for beside Dice and IoU -> its columns."""

MEASURED = ("surface", "lesions", "centreline", "instances")
"""Those that need more than counts, each by an option of its own."""

OBJECTS = "objects"
"""The one class of maps in which each number is an object."""


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
        transpose: the same, after the axes of the prediction were reversed.
        empty: score of a class that is in neither map of a case: nan, which is in no mean, or 1.
        missing: a reference without prediction: "skip", which lists it as not scored, or "0", an empty prediction.
        metrics: scores beside Dice and IoU, of `METRICS`.
        scale: what stands for a probability of 1 in predictions: 255 in 8 bits.
        round: labels that are nearly whole are rounded.
        surface: class, by number or name -> tolerance of its surface Dice; "" for all others. None: no distances.
        surface_unit: "mm", or "px": every voxel is 1 wide.
        penalty: distance of a class that only one of the two maps of a case has, in that unit; inf; or "diagonal", that
            of the image.
        matching, reach: of lesions, see `lesion_dice`.
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
    transpose: bool = False
    empty: float = math.nan
    missing: str = "skip"
    metrics: tuple[str, ...] = ()
    scale: float = 1.0
    round: bool = False
    surface: dict[str, float] | None = None
    surface_unit: str = "mm"
    penalty: float | str = math.inf
    matching: float | str = 0.5
    reach: Reach = "above"

    @property
    def rule(self) -> Rule:
        """What a lesion is, and which two belong together."""
        return Rule(self.matching, self.reach)

    @property
    def instances(self) -> bool:
        """Whether each number above 0 is an object."""
        return "instances" in self.metrics

    @property
    def measured(self) -> tuple[str, ...]:
        """The columns of what is measured of shapes."""
        return tuple(name for metric in self.metrics if metric in MEASURED for name in METRICS[metric])

    @property
    def keys(self) -> tuple[int | str, ...] | None:
        """The classes where they are known beforehand; a label that is ignored is none."""
        if self.instances:
            return (OBJECTS,)
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
    threshold, scale = others["threshold"], others.get("scale", 1.0)
    if threshold is not None and not 0 <= threshold < 1:
        raise ScoreError(f"--threshold: expected a number from 0 to below 1, got {threshold}. Example: 0.5")
    if not 0 < scale < math.inf:
        raise ScoreError(f"--scale: expected a number above 0, got {scale}. Example: 255")
    if scale != 1 and threshold is None and not others["soft"]:
        raise ScoreError("--scale: expected --threshold or --soft with it, got neither. Pass one of them.")
    for other in ("ignore_geometry", "transpose"):
        if others["resample"] and others.get(other):
            option = "--" + other.replace("_", "-")
            raise ScoreError(f"score: expected --resample or {option}, got both. Pass one of them.")
    if others["resample"]:
        package("--resample", "scipy", "score")
    table = Labels() if labels is None else parse_labels(labels)
    unions = table.regions if regions is None else parse_regions(regions)
    if (others["soft"] or others["threshold"] is not None) and len(unions or table.labels or (1,)) != 1:
        raise ScoreError("--soft, --threshold: expected one class, got several. Name one with --labels or --regions.")
    left_out = () if ignore is None else parse_numbers("--ignore", ignore)
    if regions is not None and Path(regions).suffix == ".json":
        left_out += parse_labels(regions).ignore
    left_out = tuple(dict.fromkeys((*left_out, *table.ignore)))
    policies = {"--empty": (others["empty"], ("nan", "1")), "--missing": (others["missing"], ("skip", "0"))}
    for option, (given, allowed) in policies.items():
        if given not in allowed:
            raise ScoreError(f"{option}: expected {' or '.join(allowed)}, got {given!r}.")
    asked = [name.strip() for name in (others["metrics"] or "").split(",") if name.strip()]
    by_name = [name for name in METRICS if name not in MEASURED]
    if not {*asked} <= {*by_name}:
        raise ScoreError(f"--metrics: expected some of {', '.join(by_name)}, got {others['metrics']!r}.")
    surface, matching = others.pop("surface", None), others.pop("matching", None)
    penalty = others.pop("penalty", None)
    if penalty is not None:
        others["penalty"] = parse_penalty(penalty)
        if surface is None:
            raise ScoreError("--penalty: expected --surface with it, got none. Pass --surface, too.")
    flags = {"surface": surface is not None, "lesions": others.pop("lesions", False)}
    flags |= {"centreline": others.pop("centreline", False), "instances": others.pop("instances", False)}
    asked += [name for name in MEASURED if flags[name]]
    if any(flags.values()) and others["soft"]:
        option = next(name for name in MEASURED if flags[name])
        advice = "Probabilities have no surface, and no parts."
        raise ScoreError(f"--{option}: expected label maps or --threshold, got --soft. {advice}")
    if flags["lesions"]:
        package("--lesions", "cc3d", "lesions")
    if flags["centreline"]:
        package("--centreline", "skimage", "lesions")
    if flags["instances"]:
        rivals = {"--labels": labels, "--regions": regions, "--include-background": others["include_background"]}
        rivals |= {"--lesions": flags["lesions"], "--threshold": threshold is not None}
        rival = next((option for option, passed in rivals.items() if passed), None)
        if rival is not None:
            raise ScoreError(
                f"--instances: expected no {rival}, got both. Each number above 0 is an object of one class."
            )
    if matching is not None:
        others["matching"], others["reach"] = parse_matching(matching)
        if not (flags["lesions"] or flags["instances"]):
            raise ScoreError(
                "--matching: expected --lesions or --instances with it, got neither. Pass one of them, too."
            )
        if flags["instances"] and isinstance(others["matching"], str):
            raise ScoreError(f"--matching: expected an overlap (IoU) with --instances, got {matching!r}. Example: 0.5")
    if surface is not None:
        others["surface"], others["surface_unit"] = parse_surface(surface)
        known = {*map(str, table.labels or ()), *table.names.values(), *(unions or ())}
        lost = next((name for name in others["surface"] if name and known and name not in known), None)
        if lost is not None:
            raise ScoreError(f"--surface: expected a class that --labels or --regions names, got {lost!r}.")
    others |= {"empty": float(others["empty"]), "metrics": tuple(dict.fromkeys(asked))}
    return Options(table.labels, table.names, unions or None, left_out, **others)


@dataclass(frozen=True)
class Labels:
    """What is said about labels.

    Args:
        labels: those that are scored, None for all. names: label -> name.
        regions: name -> labels, where one class has several; then these are scored instead.
        ignore: voxels that nobody annotated.
    """

    labels: tuple[int, ...] | None = None
    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()


def parse_labels(text: str) -> Labels:
    """text or JSON file -> Labels.

    Example:
        >>> parse_labels("1,2,5").labels
        (1, 2, 5)
        >>> parse_labels("liver=1, tumour=2").names
        {1: 'liver', 2: 'tumour'}

    A file is JSON as nnU-Net's dataset.json has it, {"labels": {"background": 0, "liver": 1, "ignore": 2}}, as the
    Medical Segmentation Decathlon has it, {"labels": {"0": "background"}}, or the inner object alone. As in nnU-Net,
    the voxels of the label named `ignore` are left out, and where a class has several labels all classes but the
    background are regions. The background gives its name but is not among the labels of a file.
    """
    if Path(text).suffix == ".json":
        entries, order = _json(Path(text))
        ignore = entries.pop("ignore", ())
        if len(ignore) > 1:
            raise ScoreError(f"{text}: expected one number for 'ignore', got {list(ignore)}.")
        numbers = {value[0]: name for name, value in entries.items() if len(set(value)) == 1}
        several = {name: value for name, value in entries.items() if set(value) != {0}}
        if len(numbers) == len(entries):
            several = {}
        elif order is not None and len(order) != len(several):
            got = f"{len(order)} for {len(several)}: {', '.join(several)}"
            raise ScoreError(f"{text}: expected as many numbers in regions_class_order as regions, got {got}.")
        return Labels(tuple(sorted(label for label in numbers if label != 0)), numbers, several, ignore)
    named = _named("--labels", text, ",", r"(?:(.+?)\s*=\s*)?(-?\d+)", "numbers, name=number or a .json file", "1,2,5")
    labels = tuple(dict.fromkeys(label for _, (label,) in named))
    return Labels(labels, {label: name for name, (label,) in named if name})


def parse_regions(text: str) -> dict[str, tuple[int, ...]]:
    """text or JSON file -> name -> labels. Of a dataset.json the background and `ignore` are no regions.

    Example:
        >>> parse_regions("whole=1,2,4; core=1,4")
        {'whole': (1, 2, 4), 'core': (1, 4)}
    """
    if Path(text).suffix == ".json":
        entries, _ = _json(Path(text))
        return {name: value for name, value in entries.items() if name != "ignore" and (name, value) != BACKGROUND}
    pattern, example = r"(.+?)\s*=\s*(-?\d+(?:\s*,\s*-?\d+)*)", "whole=1,2,4; core=1,4"
    return dict(_named("--regions", text, ";", pattern, "name=labels or a .json file", example))


def parse_surface(text: str) -> tuple[dict[str, float], str]:
    """text -> tolerances by class, "" for all that are not named, and their unit.

    Example:
        >>> parse_surface("2mm, liver=1mm")
        ({'': 2.0, 'liver': 1.0}, 'mm')
    """
    tolerances: dict[str, float] = {}
    units = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(.+?)\s*=\s*)?(\d+\.?\d*|\.\d+)\s*(mm|px)\s*", part)
        if match is None or (match[1] or "") in tolerances:
            wanted = "a tolerance in mm or px, then class=tolerance for those with another"
            raise ScoreError(f"--surface: expected {wanted}, got {part.strip()!r}. Example: 2mm,liver=1mm")
        tolerances[match[1] or ""] = float(match[2])
        units.add(match[3])
    if "" not in tolerances or len(units) > 1:
        wanted = "one tolerance for all classes that are not named, and one unit"
        raise ScoreError(f"--surface: expected {wanted}, got {text!r}. Example: 2mm,liver=1mm")
    return tolerances, units.pop()


def parse_penalty(text: str) -> float | str:
    """text -> the distance of a class that only one map has, in the unit of --surface, or "diagonal".

    Example:
        >>> parse_penalty("374"), parse_penalty("diagonal"), parse_penalty("inf")
        (374.0, 'diagonal', inf)
    """
    text = text.strip().lower()
    if text != "diagonal" and not re.fullmatch(r"\d+\.?\d*|\.\d+|inf", text):
        wanted = "a distance in the unit of --surface, diagonal (of the image) or inf"
        raise ScoreError(f"--penalty: expected {wanted}, got {text!r}. Example: 374")
    return text if text == "diagonal" else float(text)


def parse_matching(text: str) -> tuple[float | str, Reach]:
    """text -> the overlap above which, or from which on, lesions match, or the name of a challenge.

    Example:
        >>> parse_matching("0.5"), parse_matching(">=0.5"), parse_matching("BraTS-MET")
        ((0.5, 'above'), (0.5, 'at_least'), ('BraTS-MET', 'above'))
    """
    if text in CHALLENGES:
        return text, "above"
    match = re.fullmatch(r"\s*(>=|>)?\s*(\d+\.?\d*|\.\d+)\s*", text)
    try:
        if match is not None:
            return float(match[2]), Rule(float(match[2]), "at_least" if match[1] == ">=" else "above").reach
    except ValueError:
        pass
    wanted = f"an overlap (IoU) below 1 that pairs exceed, >= and one above 0, or one of {', '.join(CHALLENGES)}"
    raise ScoreError(f"--matching: expected {wanted}, got {text!r}. Example: 0.5 or '>=0.5'")


BACKGROUND = ("background", (0,))


def _named(
    option: str, text: str, separator: str, pattern: str, wanted: str, example: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Parts of a text that match the pattern (name, numbers) -> pairs of them."""
    entries = []
    for part in filter(None, (part.strip() for part in text.split(separator))):
        match = re.fullmatch(pattern, part)
        if match is None or re.search(r"=\s*-?\d+\s*[\s,;]", match[1] or ""):  # two, with another sign between them
            raise ScoreError(f"{option}: expected {wanted}, got {part!r}. Example: {example}")
        entries.append((match[1] or "", tuple(int(number) for number in match[2].split(","))))
    if not entries:
        raise ScoreError(f"{option}: expected {wanted}, got {text!r}. Example: {example}")
    _distinct(option, [(name, value) for name, value in entries if name])
    return entries


def _distinct(source: str, entries: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuses one name for two classes, and one number with two names: the scores of one of them would be lost."""
    for what, found in (
        ("names that differ", [name for name, _ in entries]),
        ("one name for each number", [str(value[0]) for _, value in entries if len(value) == 1]),
    ):
        twice = next((each for each in found if found.count(each) > 1), None)
        if twice is not None:
            raise ScoreError(f"{source}: expected {what}, got {twice!r} twice. Rename one, or leave it out.")


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """text -> whole numbers.

    Example:
        >>> parse_numbers("--ignore", "255, -1")
        (255, -1)
    """
    if not re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        raise ScoreError(f"{option}: expected whole numbers, got {text!r}. Example: 255 or 254,255")
    return tuple(int(number) for number in text.split(","))


def _json(path: Path) -> tuple[dict[str, tuple[int, ...]], list[Any] | None]:
    """JSON file with {"name": 1}, {"name": [1, 2]} or {"1": "name"} -> name -> labels, and nnU-Net's class order."""

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=Pairs)  # Windows writes a mark
    except (OSError, ValueError, RecursionError) as error:
        raise ScoreError(f"{path}: expected a JSON file with labels, got {' '.join(str(error).split())}.") from error
    outer = dict(content) if isinstance(content, Pairs) else {}
    inner = outer["labels"] if isinstance(outer.get("labels"), Pairs) else content
    entries = []
    for key, value in inner if isinstance(inner, Pairs) else ():
        if isinstance(value, str) and re.fullmatch(r"-?\d+", key):
            entries.append((value, (int(key),)))
            continue
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            wanted = '"name": number, "name": [numbers] or "number": "name"'
            raise ScoreError(f"{path}: labels: expected {wanted}, got {key!r}: {value!r}.")
        entries.append((key, tuple(numbers)))
    if not entries:
        raise ScoreError(f"{path}: labels: expected an object of names and labels, got {str(content)[:60]!r}.")
    _distinct(str(path), entries)
    order = outer.get("regions_class_order")
    return dict(entries), order if isinstance(order, list) else None


class Pairs(list[tuple[str, Any]]):
    """An object of a JSON file with its names as they stand, those that stand twice too."""
