"""`softdice score`: the Dice coefficient and friends for folders of masks."""

from __future__ import annotations

import io
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from softdice.cli.errors import one_line
from softdice.cli.progress import drawn
from softdice.parallel.ranks import Ranks
from softdice.validation import package

if TYPE_CHECKING:
    from softdice.scoring import Case, Comparison, Options, Pair, Summary, Table
    from softdice.scoring.journal import Journal
    from softdice.scoring.torchrun import Run

FORMATS = ("table", "csv", "json", "nnunet")
ROWS = ("pairs", "classes", "cases")

PLAIN_WIDTH = 500
"""Columns of a table that goes to a file or a pipe."""


def score(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="A mask, or a folder of masks.")],
    labels_path: Annotated[Path, typer.Argument(metavar="LABELS", help="The reference: a mask, or a folder of them.")],
    versus: Annotated[
        list[Path] | None, typer.Option(help="Other predictions of the same cases, to compare with; may be repeated.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels to score: 1,2,5 or liver=1,tumour=2 or a dataset.json. Default: all.")
    ] = None,
    regions: Annotated[
        str | None, typer.Option(help="Score unions of labels instead: 'whole=1,2,4; core=1,4' or a .json.")
    ] = None,
    ignore: Annotated[str | None, typer.Option(help="Labels of the reference whose voxels are left out.")] = None,
    include_background: Annotated[bool, typer.Option("--include-background", help="Score label 0 too.")] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Predictions are probabilities: in the class where larger than this.")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="What stands for probability 1: 100 in percent, 255 in 8 bits, 65535 in 16.")
    ] = 1.0,
    soft: Annotated[bool, typer.Option("--soft", help="Predictions are probabilities: soft Dice.")] = False,
    round: Annotated[
        bool, typer.Option("--round", help="Round labels that are stored as nearly whole numbers.")
    ] = False,
    resample: Annotated[bool, typer.Option("--resample", help="Bring predictions to the grid of the label.")] = False,
    ignore_geometry: Annotated[
        bool, typer.Option("--ignore-geometry", help="Compare voxels by position, whatever the affines say.")
    ] = False,
    transpose: Annotated[
        bool, typer.Option("--transpose", help="Axes of predictions stand in reversed order: rows are columns.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="files of the two folders; subfolders: theirs too; classes: a folder per case, with a file per class."
        ),
    ] = "files",
    metrics: Annotated[
        str | None, typer.Option(help="Beside Dice and IoU: precision, recall, specificity, volume (ml, difference).")
    ] = None,
    surface: Annotated[
        str | None,
        typer.Option(help="HD95, mean distance and surface Dice at this tolerance: 2mm, 2mm,liver=1mm or 3px."),
    ] = None,
    penalty: Annotated[
        str | None,
        typer.Option(help="With --surface: distance of a class that only one side has, as 374 (inf), or diagonal."),
    ] = None,
    lesions: Annotated[
        bool, typer.Option("--lesions", help="Lesion Dice, panoptic quality and its factors, of connected parts.")
    ] = False,
    matching: Annotated[
        str | None,
        typer.Option(
            help="With --lesions, --instances: they match above this overlap (IoU), 0.5, or from it on, '>=0.5'; "
            "or BraTS-GLI, -SSA, -PED, -MEN, -MET."
        ),
    ] = None,
    centreline: Annotated[
        bool, typer.Option("--centreline", help="Dice of the centre lines of vessels (clDice).")
    ] = False,
    instances: Annotated[
        bool,
        typer.Option(
            "--instances", help="Each number is an object, as of a cell: panoptic quality, F1 and AP by matching them."
        ),
    ] = False,
    empty: Annotated[
        str, typer.Option(help="Score of a class in neither map of a case: nan (in no mean) or 1.")
    ] = "nan",
    missing: Annotated[str, typer.Option(help="Cases without prediction: skip (listed), or 0: an empty one.")] = "skip",
    jobs: Annotated[int, typer.Option(help="Processes. The results do not depend on it.", min=1)] = 1,
    format: Annotated[
        str | None, typer.Option(help="table, csv, json or nnunet (its summary.json). Default: by --out, else table.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Of a CSV: pairs of case and class (default); classes, with means; cases, a column per class. "
            "With json: the same as a flat list, which pandas.read_json takes."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result; else standard output.")] = None,
    report: Annotated[Path | None, typer.Option(help="File for a report in HTML, one page with pictures.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, by the names of the cases, for the report's pictures.")
    ] = None,
    view: Annotated[
        str, typer.Option(help="Of the pictures: radiological (the patient's left is right), or neurological.")
    ] = "radiological",
    resume: Annotated[bool, typer.Option("--resume", help="With --out: go on where a stopped run ended.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is no result of an earlier run, too.")
    ] = False,
) -> None:
    """Score masks against labels: Dice and IoU per case and class, means with intervals, pooled.

    A class that is in neither mask of a case is not scored there, one that is in only one of them scores 0.
    Exit code 0: all scored; 1: some files could not be scored, they are listed at the end; 2: wrong usage.
    """
    from softdice.scoring.torchrun import sharing

    with sharing() as run:
        if run is None:  # a rank that torchrun started beside the first
            return
        with one_line():
            from softdice.evaluation.labels import ScoreError
            from softdice.scoring.error_pictures import VIEWS
            from softdice.scoring.options import parse_options
            from softdice.scoring.pairing import LAYOUTS

            others = tuple(versus or ())
            for option, given, allowed in (
                ("--format", format, (None, *FORMATS)), ("--layout", layout, LAYOUTS), ("--view", view, VIEWS),
            ):  # fmt: skip
                if given not in allowed:
                    wanted = ", ".join(filter(None, allowed))
                    raise ScoreError(f"{option}: expected one of {wanted}, got {given!r}.")
            kind = _check(format, rows, others, out, report, resume)
            task = Task(
                predictions, labels_path, layout, others, jobs, kind, rows, out, report, images, view, overwrite
            )
            options = parse_options(
                labels, regions, ignore, include_background=include_background, threshold=threshold, soft=soft,
                resample=resample, ignore_geometry=ignore_geometry, transpose=transpose, scale=scale, round=round,
                empty=empty, missing=missing, metrics=metrics, surface=surface, penalty=penalty, lesions=lesions,
                matching=matching, centreline=centreline, instances=instances,
            )  # fmt: skip
            pairs = _pairs(task, (labels, regions, ignore, "--instances" if instances else None))
            failed = _score(task, pairs, options, _journal(task, options, resume=resume), run)
        if failed:
            raise typer.Exit(failed)


@dataclass(frozen=True)
class Task:
    """What is read and what is written."""

    predictions: Path
    truth: Path
    layout: str
    versus: tuple[Path, ...]
    jobs: int
    format: str
    rows: str | None
    out: Path | None
    report: Path | None
    images: Path | None
    view: str
    overwrite: bool


def _check(
    format: str | None, rows: str | None, versus: tuple[Path, ...], out: Path | None, report: Path | None, resume: bool
) -> str:
    """What can be said of the options alone; the format."""
    from softdice.evaluation.labels import ScoreError
    from softdice.scoring.output_files import is_stream, kind_of

    if versus and format == "nnunet":
        raise ScoreError("--format nnunet: expected one folder of predictions, got --versus. Take --format json.")
    if resume and (out is None or is_stream(out)):
        raise ScoreError("--resume: expected --out, beside which a stopped run leaves its cases, got none.")
    if out is None and sys.stdout is None:
        raise ScoreError("score: expected a standard output, got a closed one. Pass --out.")
    for option, given, name in (("--versus", versus, "scipy"), ("--report", report, "PIL")):
        if given:
            package(option, name, "score")
    kind = kind_of(out, format)
    if rows is not None and (rows not in ROWS or kind not in ("csv", "json")):
        raise ScoreError(f"--rows: expected one of {', '.join(ROWS)}, with --format csv or json, got {rows!r}.")
    return kind


def _pairs(task: Task, said: Iterable[str | None]) -> dict[str, list[Pair]]:
    """Both sides' pairs; a wrong path must not touch what is there. said: options that may name files."""
    from softdice.evaluation.labels import ScoreError
    from softdice.images.files import stored
    from softdice.scoring import pair_files
    from softdice.scoring.output_files import check_places

    if task.images is not None and not (task.images.is_dir() and task.report):
        raise ScoreError(f"--images: expected a folder, with --report, got {str(task.images)!r}.")
    if task.layout == "classes" and (any(said) or task.format == "nnunet"):
        raise ScoreError(
            "--layout classes: expected no --labels, --regions, --ignore, --instances or nnunet: files are the classes."
        )
    sides = (task.predictions, *task.versus)
    for i, side in enumerate(sides):
        same = next((other for other in sides[:i] if other.resolve() == side.resolve()), None)
        if same is not None:
            raise ScoreError(f"--versus: expected other predictions than {same}, got the same.")
    pairs = {str(side): pair_files(side, task.truth, task.layout) for side in sides}
    read = {stored(path) for side in pairs.values() for pair in side for path in (pair.prediction, pair.truth) if path}
    files = (file for path in read for file in (path.iterdir() if path.is_dir() else (path,)))
    check_places(
        task.out,
        task.report,
        (*files, *_images(task).values(), *(Path(text) for text in said if text and text.endswith(".json"))),
        overwrite=task.overwrite,
    )
    return pairs


def _images(task: Task) -> dict[str, Path]:
    """Case -> its image."""
    if task.images is None:
        return {}
    from softdice.scoring.pairing import case_files

    return case_files(task.images, deep=task.layout != "files")


def _journal(task: Task, options: Options, *, resume: bool) -> Journal | None:
    from softdice.scoring.journal import Journal
    from softdice.scoring.output_files import is_stream

    if task.out is None or is_stream(task.out):
        return None
    about = [str(path.resolve()) for path in (task.predictions, task.truth, *task.versus)]
    return Journal(task.out.with_name(task.out.name + ".partial"), options, about, resume=resume)


def _score(task: Task, pairs: dict[str, list[Pair]], options: Options, journal: Journal | None, run: Run) -> int:
    """Score, write, list what failed; the exit code."""
    from softdice.evaluation.text import shown
    from softdice.scoring import compare, summarise, tabulate
    from softdice.scoring.output_files import save
    from softdice.scoring.summary import renumbered_line, unnamed_line
    from softdice.scoring.text_tables import done_line

    total = sum(map(len, pairs.values()))
    tables: dict[str, Table] = {}
    with _ctrl_c() as pressed, _progress(total) as step:

        def seen(cases: Iterable[Case]) -> Iterator[Case]:
            for case in cases:
                step(case.case)
                yield case
                if pressed:
                    return

        for side, found in pairs.items():
            if not (pressed and tables):
                cases = _cases(side, found, journal, lambda left: run(left, options, jobs=task.jobs))
                tables[side] = tabulate(
                    seen(cases), options.keys, options.names, empty=options.empty, metrics=options.metrics
                )
    done = sum(len(table.cases) + len(table.errors) for table in tables.values())
    if done < total and journal is not None:
        journal.close(finished=False)
        print(f"Stopped after {done} of {total}. The same command with --resume goes on from there.", file=sys.stderr)
        return 130
    summaries = {side: summarise(table) for side, table in tables.items()}
    first, *others = tables.values()
    comparisons = [compare(first, other) for other in others]
    _write(task, tables, summaries, comparisons, options)
    if journal is not None:
        journal.close(finished=True)
    if task.report is not None:
        from softdice.scoring.report import to_html

        command = shlex.join(["softdice", *sys.argv[1:]])
        page = to_html(
            tables, summaries, comparisons, options, str(task.truth),
            command=command, images=_images(task), view=task.view,
        )  # fmt: skip
        save(task.report, [page])
    unnamed = unnamed_line(next(iter(tables.values())))
    for line in filter(None, (unnamed, renumbered_line(tables.values()))):
        print(line, file=sys.stderr)
    empty = sum(prediction == "" for table in tables.values() for prediction in table.predictions)
    if empty:
        print(f"Without a prediction, scored as an empty one: {empty} of {total}", file=sys.stderr)
    for line in _left_out(task, pairs):
        print(shown(line), file=sys.stderr)
    errors = [error for table in tables.values() for error in table.errors]
    if errors:
        print(f"Not scored: {len(errors)} of {total}", *map(shown, errors), sep="\n  ", file=sys.stderr)
    if task.out is not None or task.report is not None:
        print(done_line(tables, summaries, task.out, task.report), file=sys.stderr)
    if done < total:
        print(f"Stopped after {done} of {total}: these are the scores so far.", file=sys.stderr)
        return 130
    return 1 if errors else 0


def _left_out(task: Task, pairs: dict[str, list[Pair]]) -> Iterator[str]:
    """Name what the folders hold beside the files of the pairs, a line for each folder."""
    from softdice.images.files import FileError, left_out
    from softdice.scoring.pair_loading import class_files
    from softdice.scoring.pairing import case_folders

    read = [path for side in pairs.values() for pair in side for path in (pair.prediction, pair.truth) if path]
    for folder in [path for path in read if path.is_dir()] if task.layout == "classes" else ():
        with suppress(FileError):  # told where the case is scored
            read += class_files(folder).values()
    for root in dict.fromkeys((*map(Path, pairs), task.truth)):
        for folder, files in case_folders(root, read, task.layout).items():
            if line := left_out(folder, files):
                yield line


def _cases(
    side: str, pairs: list[Pair], journal: Journal | None, run: Callable[[list[Pair]], Generator[Case, None, None]]
) -> Iterator[Case]:
    """Cases in the order of the pairs: those that a stopped run left, and the others scored now."""
    done = {} if journal is None else journal.done
    with closing(run([pair for pair in pairs if (side, pair.case) not in done])) as running:
        for pair in pairs:
            case = done.pop((side, pair.case), None)
            if case is None:
                case = next(running)
                if journal is not None:
                    journal.add(side, case)
            yield case


@contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Ctrl-C inside fills the list and lets the case that is being scored finish; a second one ends at once.

    Not under torchrun: it hands on each Ctrl-C that its processes have had already, and ends them itself in the end.
    """
    pressed: list[bool] = []

    def press(*_: object) -> None:
        if pressed and Ranks.here() is None:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; called once per case."""
    from softdice.evaluation.text import shown

    console = Console(stderr=True, emoji=False)
    with drawn(console) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda name: bar.update(task, advance=1, description=escape(shown(name)))


def _write(
    task: Task,
    tables: dict[str, Table],
    summaries: dict[str, Summary],
    comparisons: list[Comparison],
    options: Options,
) -> None:
    from softdice.scoring import formats
    from softdice.scoring.output_files import save

    if task.format == "table":
        text = _shown(tables, summaries, comparisons, plain=task.out is not None)
    elif task.format == "csv":
        text = formats.to_csv(tables, summaries, task.rows or "pairs")
    elif task.format == "json" and task.rows is not None:
        text = formats.to_json_rows(tables, summaries, task.rows)
    elif task.format == "json":
        text = formats.to_json(tables, summaries, comparisons, options)
    else:
        text = formats.to_nnunet(next(iter(tables.values())), options)
    if task.out is None:
        sys.stdout.writelines(piece.encode("utf-8", "backslashreplace").decode() for piece in text)
        sys.stdout.flush()  # a pipe that was closed is seen here
    else:
        save(task.out, text)


def _shown(
    tables: dict[str, Table], summaries: dict[str, Summary], comparisons: list[Comparison], *, plain: bool
) -> Iterator[str]:
    """Tables as text, with the colours of the terminal where there is one."""
    from softdice.scoring.text_tables import (
        alone_line,
        class_grid,
        comparison_grid,
        different_lines,
        models_grid,
        rank_line,
        shapes_grid,
        terminal,
    )  # fmt: skip

    console = Console(file=io.StringIO()) if plain else Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH)
    grids = [terminal(side, class_grid(table, summaries[side]), console.width) for side, table in tables.items()]
    if len(tables) > 1:
        grids.insert(0, terminal("all predictions", models_grid(tables, [*summaries.values()]), console.width))
    for grid in grids:
        with console.capture() as captured:
            console.print(grid)
        yield captured.get()
    first = next(iter(tables.values()))
    for name, comparison in zip(list(tables)[1:], comparisons, strict=True):
        title = "first minus second" if len(tables) == 2 else f"first minus {name}"
        with console.capture() as captured:
            console.print(terminal(title, comparison_grid(first, comparison), console.width))
            if comparison.shapes:
                console.print(terminal(f"{title}: shapes", shapes_grid(first, comparison), console.width))
        yield captured.get()
        different = different_lines(first, comparison)
        lines = [
            alone_line(comparison),
            *(["Cases that differ most:", *(f"  {line}" for line in different)] * bool(different)),
        ]
        yield "".join(f"{line}\n" for line in lines if line)
    yield "".join(f"{line}\n" for line in (rank_line(tables),) if line)
