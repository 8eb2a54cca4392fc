"""Score two folders of masks from Python, as `softdice score` does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from softdice.evaluation.labels import ScoreError
from softdice.scoring.formats import all_case_rows, class_rows, flat, overall_row
from softdice.scoring.options import parse_options
from softdice.scoring.pairing import check_layout, pair_files
from softdice.scoring.runner import run
from softdice.scoring.summary import summarise, tabulate, unused_tolerances_line
from softdice.validation import numbers_of

Labels = str | Sequence[int] | Mapping[str, int]


class Scores(list[dict[str, Any]]):
    """A row for each case and class, which `pandas.DataFrame` takes, with their means.

    Args:
        rows: for each case and class, column -> value.
        classes: a row for each class: means, intervals, pooled scores. overall: the same over all classes.
        errors: the reason for each case that could not be scored.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        classes: list[dict[str, Any]],
        overall: dict[str, Any],
        errors: list[str],
    ) -> None:
        super().__init__(rows)
        self.classes, self.overall, self.errors = classes, overall, errors


def score_folders(
    predictions: str | PathLike[str],
    reference: str | PathLike[str],
    *,
    labels: Labels | None = None,
    regions: str | Mapping[str, Sequence[int]] | None = None,
    ignore: str | int | Sequence[int] | None = None,
    include_background: bool = False,
    threshold: float | None = None,
    soft: bool = False,
    scale: float = 1.0,
    round: bool = False,
    resample: bool = False,
    ignore_geometry: bool = False,
    transpose: bool = False,
    layout: Literal["files", "subfolders", "classes"] = "files",
    metrics: str | Sequence[str] | None = None,
    surface: str | None = None,
    penalty: float | str | None = None,
    lesions: bool = False,
    matching: float | str | None = None,
    centreline: bool = False,
    instances: bool = False,
    empty: Literal["nan", "1"] = "nan",
    missing: Literal["skip", "0"] = "skip",
    jobs: int = 1,
) -> Scores:
    """Score two folders of masks, or two masks: a row of Dice, IoU and counts for each case and class.

    The keywords are the options of `softdice score`, which the page "Scores" explains; numbers, lists and dicts may
    stand for their texts. A case that cannot be scored raises no error: a warning says so, and `errors` why.

    Args:
        predictions, reference: two files, or two folders whose files belong together by name.
        labels: [1, 2], {"liver": 1}, or a text. regions: {"whole": [1, 2, 4]}, or a text. ignore: 255, or several.
        surface: a text with its unit, as "2mm". penalty: a number in that unit, or "diagonal".
        jobs: processes. Above 1 the script needs the guard `if __name__ == "__main__":`.

    Raises:
        ScoreError: a folder or an option that cannot be used, with the command's message.

    Example:
        >>> import numpy as np, pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for side, mask in (("p", [[0, 1, 1]]), ("t", [[0, 0, 1]])):
        ...     (folder / side).mkdir()
        ...     np.save(folder / side / "a.npy", np.array(mask, np.uint8))
        >>> scores = score_folders(folder / "p", folder / "t", labels={"liver": 1})
        >>> [(row["case"], row["name"], round(row["dice"], 4)) for row in scores]
        [('a', 'liver', 0.6667)]
    """
    names = labels if isinstance(labels, Mapping) else {}
    several = [name for name, part in names.items() if "," in str(_text(part))]
    if several:
        got = f"several for {several[0]!r}"
        raise ScoreError(f"labels: expected one number for each name, got {got}. Pass regions for unions of labels.")
    check_layout(layout, (labels, regions, ignore, instances or None))
    if jobs < 1:
        raise ScoreError(f"jobs: expected at least 1 process, got {jobs}. Leave it out for one.")
    options = parse_options(
        _text(labels), _text(regions, ";"), _text(ignore),
        include_background=include_background, threshold=threshold, soft=soft, scale=scale, round=round,
        resample=resample, ignore_geometry=ignore_geometry, transpose=transpose, metrics=_text(metrics),
        surface=_text(surface), penalty=_text(penalty), lesions=lesions, matching=_text(matching),
        centreline=centreline, instances=instances, empty=str(_text(empty)), missing=str(_text(missing)),
    )  # fmt: skip
    pairs = pair_files(Path(predictions), Path(reference), layout)
    cases = run(pairs, options, jobs=jobs)
    table = tabulate(cases, options.keys, options.names, empty=options.empty, metrics=options.metrics)
    if table.errors:
        count = f"{len(table.errors)} of {len(pairs)} cases"
        warnings.warn(f"score_folders: {count} were not scored, see .errors: {table.errors[0]}", stacklevel=2)
    if line := unused_tolerances_line([table], options):
        warnings.warn(f"score_folders: {line}", stacklevel=2)
    summary = summarise(table)
    classes = [dict(flat(row)) for row in class_rows(table, summary)]
    return Scores([*all_case_rows(table)], classes, dict(flat(overall_row(summary))), table.errors)


def _text(value: Any, separator: str = ",") -> str | None:
    """Return the text of an option, from a number, list or dict, as the command takes it; None if it is left out.

    `separator` stands between the entries of a dict.

    Example:
        >>> _text({"whole": [1, 2], "core": 1}, ";")
        'whole=1,2; core=1'
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return f"{separator} ".join(f"{name}={_text(part)}" for name, part in value.items())
    value = numbers_of(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)
