"""`softdice score`: Dice and other scores of folders of masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from softdice.cli.errors import one_line

FORMATS = ("table", "csv", "json", "nnunet")
ROWS = ("pairs", "classes", "cases")
LAYOUTS = ("files", "subfolders", "classes")
VIEWS = ("radiological", "neurological")
"""Choices of options."""

LABELS, READING, SCORES = "Labels", "Reading", "Scores"
COMPARISON, OUTPUT, LONG_RUNS = "Comparison", "Output", "Long runs"
"""Groups of options in the help."""

EXAMPLES = """Examples:

\b
  softdice score predictions labels
  softdice score predictions labels --labels liver=1,tumour=2 --surface 2mm --report report.html
  softdice score predictions labels --versus others --out scores.csv --jobs 4
"""


def _option(group: str, help: str, *names: str, **settings: Any) -> Any:
    """Return an option below a heading of the help, with the names that are typed, by default the parameter's.

    `settings` are other arguments of `typer.Option`.
    """
    return typer.Option(*names, help=help, rich_help_panel=group, **settings)


def _choice(group: str, help: str, choices: Sequence[str]) -> Any:
    """Return an option, below the heading `group` of the help, whose choices the help shows and the shell completes.

    `score` checks the value.
    """

    def complete(incomplete: str) -> list[str]:
        """Return the choices that begin with the word at the cursor."""
        return [choice for choice in choices if choice.startswith(incomplete)]

    return _option(group, help, metavar=f"[{'|'.join(choices)}]", autocompletion=complete)


def score(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="A mask, or a folder of masks.")],
    labels_path: Annotated[Path, typer.Argument(metavar="LABELS", help="The reference: a mask, or a folder of masks.")],
    labels: Annotated[
        str | None, _option(LABELS, "Labels to score: 1,2,5 or liver=1,tumour=2 or a dataset.json. Default: all.")
    ] = None,
    regions: Annotated[
        str | None, _option(LABELS, "Score unions of labels instead: 'whole=1,2,4; core=1,4' or a .json.")
    ] = None,
    ignore: Annotated[str | None, _option(LABELS, "Labels of the reference whose voxels are left out.")] = None,
    include_background: Annotated[bool, _option(LABELS, "Score label 0 too.", "--include-background")] = False,
    layout: Annotated[
        str,
        _choice(
            READING,
            "files of the two folders; subfolders: theirs too; classes: a folder per case, with a file per class.",
            LAYOUTS,
        ),
    ] = "files",
    missing: Annotated[
        str, _choice(READING, "Cases without prediction: skip (listed), or 0: counted as empty.", ("skip", "0"))
    ] = "skip",
    threshold: Annotated[
        float | None, _option(READING, "Predictions are probabilities; the class is where they exceed this.")
    ] = None,
    soft: Annotated[bool, _option(READING, "Predictions are probabilities: soft Dice.", "--soft")] = False,
    scale: Annotated[
        float, _option(READING, "Value that stands for probability 1: 100 in percent, 255 in 8 bits, 65535 in 16.")
    ] = 1.0,
    round: Annotated[
        bool, _option(READING, "Round labels that are stored as nearly whole numbers.", "--round")
    ] = False,
    resample: Annotated[bool, _option(READING, "Bring predictions to the grid of the label.", "--resample")] = False,
    ignore_geometry: Annotated[
        bool, _option(READING, "Compare voxels by position, whatever the affines say.", "--ignore-geometry")
    ] = False,
    transpose: Annotated[
        bool, _option(READING, "Reverse the axes of predictions: their rows are columns of the label.", "--transpose")
    ] = False,
    metrics: Annotated[
        str | None, _option(SCORES, "Beside Dice and IoU: precision, recall, specificity, volume (ml, difference).")
    ] = None,
    surface: Annotated[
        str | None,
        _option(SCORES, "HD95, mean distance and surface Dice at this tolerance: 2mm, 2mm,liver=1mm or 3px."),
    ] = None,
    penalty: Annotated[
        str | None,
        _option(SCORES, "With --surface: distance of a class that only one side has: inf (default), 374, or diagonal."),
    ] = None,
    lesions: Annotated[
        bool, _option(SCORES, "Lesion Dice, panoptic quality and its factors, of connected parts.", "--lesions")
    ] = False,
    matching: Annotated[
        str | None,
        _option(
            SCORES,
            "With --lesions or --instances: they match if their overlap (IoU) is above this, 0.5, or at least this, "
            "'>=0.5'; or by the rules of BraTS-GLI, -SSA, -PED, -MEN or -MET.",
        ),
    ] = None,
    centreline: Annotated[
        bool, _option(SCORES, "Dice of the centre lines of vessels (clDice).", "--centreline")
    ] = False,
    instances: Annotated[
        bool,
        _option(
            SCORES,
            "Each number is an object, such as a cell: panoptic quality, F1 and AP by matching them.",
            "--instances",
        ),
    ] = False,
    empty: Annotated[
        str, _choice(SCORES, "Score of a class that neither map of a case has: nan (in no mean) or 1.", ("nan", "1"))
    ] = "nan",
    confidence: Annotated[
        Path | None,
        _option(
            COMPARISON,
            "CSV of softdice predict --confidence: how well it ranks the masks by their Dice. Drawn in the report.",
        ),
    ] = None,
    versus: Annotated[
        list[Path] | None,
        _option(COMPARISON, "Other predictions of the same cases to compare with; may be repeated.", metavar="<path>"),
    ] = None,
    out: Annotated[Path | None, _option(OUTPUT, "File for the result; else standard output.")] = None,
    format: Annotated[
        str | None,
        _choice(OUTPUT, "nnunet is its summary.json. Default: what the suffix of --out says, else table.", FORMATS),
    ] = None,
    rows: Annotated[
        str | None,
        _choice(
            OUTPUT,
            "Rows of a CSV: pairs of case and class (default); classes, with means; cases, with a column per class. "
            "With --format json: the same as a flat list, which pandas.read_json takes.",
            ROWS,
        ),
    ] = None,
    report: Annotated[Path | None, _option(OUTPUT, "File for a report in HTML, one page with pictures.")] = None,
    images: Annotated[
        Path | None, _option(OUTPUT, "Folder of images, by the names of the cases, for the report's pictures.")
    ] = None,
    view: Annotated[
        str, _choice(OUTPUT, "Side of the patient's left in pictures: radiological, right; neurological, left.", VIEWS)
    ] = "radiological",
    overwrite: Annotated[
        bool, _option(OUTPUT, "Replace a file that is no result of an earlier run, too.", "--overwrite")
    ] = False,
    jobs: Annotated[int, _option(LONG_RUNS, "Processes. The results do not depend on it.", min=1)] = 1,
    resume: Annotated[bool, _option(LONG_RUNS, "With --out: go on where a stopped run ended.", "--resume")] = False,
) -> None:
    """Score masks against labels: Dice and IoU per case and class, means with intervals, pooled.

    A class that neither mask of a case has is not scored there; a class that only one of them has scores 0.
    Exit code 0: all scored; 1: some files could not be scored, they are listed at the end; 2: wrong usage.
    """
    from softdice.scoring.torchrun import sharing

    with sharing() as run:
        if run is None:  # a rank above 0 under torchrun, which has done its share
            return
        with one_line():
            from softdice.cli.score_run import Task, check_options, run_task
            from softdice.evaluation.labels import ScoreError
            from softdice.scoring.options import parse_options

            for option, value, choices in (
                ("--format", format, (None, *FORMATS)), ("--layout", layout, LAYOUTS), ("--view", view, VIEWS),
            ):  # fmt: skip
                if value not in choices:
                    wanted = ", ".join(filter(None, choices))
                    raise ScoreError(f"{option}: expected one of {wanted}, got {value!r}.")
            typed = Task(
                predictions=predictions, truth=labels_path, layout=layout, versus=tuple(versus or ()), jobs=jobs,
                format=format, rows=rows, out=out, report=report, images=images, view=view, overwrite=overwrite,
                confidence=confidence, resume=resume,
            )  # fmt: skip
            task = check_options(typed)
            options = parse_options(
                labels, regions, ignore, include_background=include_background, threshold=threshold, soft=soft,
                resample=resample, ignore_geometry=ignore_geometry, transpose=transpose, scale=scale, round=round,
                empty=empty, missing=missing, metrics=metrics, surface=surface, penalty=penalty, lesions=lesions,
                matching=matching, centreline=centreline, instances=instances,
            )  # fmt: skip
            exit_code = run_task(task, (labels, regions, ignore, "--instances" if instances else None), options, run)
        if exit_code:
            raise typer.Exit(exit_code)
