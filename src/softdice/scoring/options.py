"""The options of `softdice score`: their texts are read, checked against each other, and kept in one record."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from softdice.evaluation.labels import Labels, ScoreError, named_values, parse_labels, parse_regions
from softdice.evaluation.table import MEASURED, METRICS, measured_columns
from softdice.metrics.lesions import CHALLENGES, Reach, Rule
from softdice.validation import package

OBJECTS = "objects"
"""The one class of maps in which each number is an object."""

COUNTED = tuple(name for name in METRICS if name not in MEASURED)
"""What --metrics takes; each score of `MEASURED` has an option of its own."""


@dataclass(frozen=True)
class Options:
    """What is compared and how, for every pair.

    Args:
        labels: the labels that are scored; None for every label that occurs, without `ignore` and the background.
        names: label -> name, where known.
        regions: name -> labels that count as one class; then the regions are scored instead of the labels.
        ignore: labels of the reference whose voxels are left out.
        include_background: score label 0 too.
        threshold: a voxel of a float prediction is in the class where its value is larger.
        soft: a float prediction counts with its probability: soft Dice, 2 sum(p t) / (sum(p) + sum(t)).
        resample: a prediction on another grid is brought to the grid of the reference, by its affine.
        ignore_geometry: voxels are compared by position whatever the affines say.
        transpose: voxels are compared by position, after the axes of the prediction were reversed.
        empty: score of a class that is in neither map of a case: nan, which is in no mean, or 1.
        missing: a reference without prediction: "skip", which lists it as not scored, or "0", an empty prediction.
        metrics: scores beside Dice and IoU, of `METRICS`.
        scale: what stands for a probability of 1 in predictions: 255 in 8 bits.
        round: labels that are nearly whole are rounded.
        surface: class, by number or name -> tolerance of its surface Dice; "" for all others. None: no distances.
        surface_unit: "mm", or "px": every voxel is 1 wide.
        penalty: distance of a class that only one of the two maps of a case has, in that unit; inf; or "diagonal", the
            length of the image's diagonal.
        matching, reach: lesions or objects match if their IoU is "above" the number `matching`, or "at_least" that; a
            text is the BraTS challenge whose rules decide.
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
        """Return which lesions match."""
        return Rule(self.matching, self.reach)

    @property
    def instances(self) -> bool:
        """Return whether each number above 0 is an object."""
        return "instances" in self.metrics

    @property
    def measured(self) -> tuple[str, ...]:
        """Return the columns of the scores that need the masks."""
        return measured_columns(self.metrics)

    @property
    def keys(self) -> tuple[int | str, ...] | None:
        """Return the scored classes: regions, labels without ignored ones, or one of all objects; None: all labels."""
        if self.instances:
            return (OBJECTS,)
        if self.regions is not None:
            return tuple(self.regions)
        return None if self.labels is None else tuple(label for label in self.labels if label not in self.ignore)


def parse_options(
    labels: str | None, regions: str | None, ignore: str | None, *, include_background: bool, threshold: float | None,
    soft: bool, scale: float, round: bool, resample: bool, ignore_geometry: bool, transpose: bool, empty: str,
    missing: str, metrics: str | None, surface: str | None, penalty: str | None, lesions: bool, matching: str | None,
    centreline: bool, instances: bool,
) -> Options:  # fmt: skip
    """Read the options of `softdice score` that are texts, and check that all of them fit together.

    Each argument is the value of the option of its name; without the option it is None, False or the default. A text of
    --labels or --regions that ends in ".json" is the path of a file, which is read.

    Raise ScoreError for a text that cannot be understood, or options that exclude each other, and ModuleNotFoundError
    if an option needs a package that is not installed.
    """
    table = Labels() if labels is None else parse_labels(labels)
    unions = table.regions if regions is None else parse_regions(regions)
    ignored = () if ignore is None else parse_numbers("--ignore", ignore)
    if regions is not None and Path(regions).suffix == ".json":
        ignored += parse_labels(regions).ignore  # which a dataset.json may name
    _check_probabilities(threshold, soft, scale, len(unions or table.labels or (1,)))
    _check_geometry(resample, ignore_geometry, transpose)
    for option, value, allowed in (("empty", empty, ("nan", "1")), ("missing", missing, ("skip", "0"))):
        if value not in allowed:
            raise ScoreError(f"--{option}: expected {' or '.join(allowed)}, got {value!r}.")
    # scores that counts of voxels give (--metrics), and scores that need the masks (each has an option of its name)
    counted = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    if not {*counted} <= {*COUNTED}:
        raise ScoreError(f"--metrics: expected some of {', '.join(COUNTED)}, got {metrics!r}.")
    passed = {"surface": surface is not None, "lesions": lesions, "centreline": centreline, "instances": instances}
    measured = [name for name in MEASURED if passed[name]]
    _check_measured(measured, soft)
    if instances:
        rivals = {"--labels": labels, "--regions": regions, "--include-background": include_background}
        rivals |= {"--lesions": lesions, "--threshold": threshold is not None}
        rival = next((option for option, value in rivals.items() if value), None)
        if rival is not None:
            advice = "Each number above 0 is an object of one class."
            raise ScoreError(f"--instances: expected no {rival}, got both. {advice}")
    distance = parse_penalty("inf" if penalty is None else penalty)
    if penalty is not None and surface is None:
        raise ScoreError("--penalty: expected --surface with it, got none. Pass --surface, too.")
    overlap, reach = parse_matching("0.5" if matching is None else matching)
    if matching is not None and not (lesions or instances):
        raise ScoreError("--matching: expected --lesions or --instances with it, got neither. Pass one of them, too.")
    if instances and isinstance(overlap, str):
        got = f"{matching!r}. Example: 0.5"
        raise ScoreError(f"--matching: expected an overlap (IoU) with --instances, got {got}")
    tolerances, unit = (None, "mm") if surface is None else parse_surface(surface)
    # without names in the options, --surface may use names that only the files have
    known = {*map(str, table.labels or ()), *table.names.values(), *(unions or ())}
    unknown = next((name for name in tolerances or () if name and known and name not in known), None)
    if unknown is not None:
        raise ScoreError(f"--surface: expected a class that --labels or --regions names, got {unknown!r}.")
    return Options(
        table.labels, table.names, unions or None, ignore=tuple(dict.fromkeys((*ignored, *table.ignore))),
        include_background=include_background, threshold=threshold, soft=soft, resample=resample,
        ignore_geometry=ignore_geometry, transpose=transpose, empty=float(empty), missing=missing,
        metrics=tuple(dict.fromkeys((*counted, *measured))), scale=scale, round=round, surface=tolerances,
        surface_unit=unit, penalty=distance, matching=overlap, reach=reach,
    )  # fmt: skip


def _check_probabilities(threshold: float | None, soft: bool, scale: float, classes: int) -> None:
    """Raise ScoreError if --threshold, --soft and --scale do not fit together, or to the number of named `classes`."""
    if soft and threshold is not None:
        raise ScoreError("score: expected --soft or --threshold, got both. Pass one of them.")
    if threshold is not None and not 0 <= threshold < 1:
        raise ScoreError(f"--threshold: expected a number from 0 to below 1, got {threshold}. Example: 0.5")
    if not 0 < scale < math.inf:
        raise ScoreError(f"--scale: expected a number above 0, got {scale}. Example: 255")
    if scale != 1 and threshold is None and not soft:
        raise ScoreError("--scale: expected --threshold or --soft with it, got neither. Pass one of them.")
    if (soft or threshold is not None) and classes != 1:
        raise ScoreError("--soft, --threshold: expected one class, got several. Name one with --labels or --regions.")


def _check_geometry(resample: bool, ignore_geometry: bool, transpose: bool) -> None:
    """Raise ScoreError for --resample with an option that compares by position, ModuleNotFoundError without scipy."""
    for option, passed in (("--ignore-geometry", ignore_geometry), ("--transpose", transpose)):
        if resample and passed:
            raise ScoreError(f"score: expected --resample or {option}, got both. Pass one of them.")
    if resample:
        package("--resample", "scipy", "score")


def _check_measured(measured: list[str], soft: bool) -> None:
    """Raise ScoreError for --soft with a score that needs masks, ModuleNotFoundError if its package is not installed.

    `measured`: which of `MEASURED` the options ask for.
    """
    if measured and soft:
        advice = "Probabilities have no surface, and no parts."
        raise ScoreError(f"--{measured[0]}: expected label maps or --threshold, got --soft. {advice}")
    for name, needed in (("lesions", "cc3d"), ("centreline", "skimage")):
        if name in measured:
            package(f"--{name}", needed, "lesions")


def parse_surface(text: str) -> tuple[dict[str, float], str]:
    """Read --surface: return tolerances by class ("" for all that are not named), and their unit, "mm" or "px".

    Raise ScoreError for a text of another form.

    Example:
        >>> parse_surface("2mm, liver=1mm")
        ({'': 2.0, 'liver': 1.0}, 'mm')
    """
    wanted, example = "a tolerance in mm or px, then class=tolerance for those with another", "2mm,liver=1mm"
    pairs = named_values("--surface", text, ",", r"(?:\d+\.?\d*|\.\d+)\s*(?:mm|px)", wanted, example)
    units, count_unnamed = {value[-2:] for _, value in pairs}, [name for name, _ in pairs].count("")
    if count_unnamed != 1 or len(units) > 1:
        wanted = wanted if count_unnamed > 1 else "one tolerance for all classes that are not named, and one unit"
        raise ScoreError(f"--surface: expected {wanted}, got {text!r}. Example: {example}")
    return {name: float(value[:-2]) for name, value in pairs}, units.pop()


def parse_penalty(text: str) -> float | str:
    """Read --penalty, a distance in the unit of --surface, "inf" or "diagonal"; raise ScoreError for another text.

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
    """Read --matching: return the overlap (IoU) for lesions to match, and whether it is to be exceeded or reached.

    In the place of the overlap may stand the name of a challenge, whose own rule decides: "above" is then a placeholder
    that nobody reads. Raise ScoreError for a text that is neither, and for
    an overlap that `Rule` refuses.

    Example:
        >>> parse_matching("0.5"), parse_matching(">=0.5"), parse_matching("BraTS-MET")
        ((0.5, 'above'), (0.5, 'at_least'), ('BraTS-MET', 'above'))
    """
    if text in CHALLENGES:
        return text, "above"
    match = re.fullmatch(r"\s*(>=|>)?\s*(\d+\.?\d*|\.\d+)\s*", text)
    with suppress(ValueError):  # of Rule, which checks the number; the message below names the option
        if match is not None:
            return float(match[2]), Rule(float(match[2]), "at_least" if match[1] == ">=" else "above").reach
    wanted = f"an overlap (IoU) below 1 that pairs exceed, >= and one above 0, or one of {', '.join(CHALLENGES)}"
    raise ScoreError(f"--matching: expected {wanted}, got {text!r}. Example: 0.5 or '>=0.5'")


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers, separated by commas; raise ScoreError, which names the option, for another text.

    Example:
        >>> parse_numbers("--ignore", "255, -1")
        (255, -1)
    """
    if not re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        raise ScoreError(f"{option}: expected whole numbers, got {text!r}. Example: 255 or 254,255")
    return tuple(int(number) for number in text.split(","))
