"""`softdice score`: Dice and other scores of folders of masks."""

from __future__ import annotations

import io
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
LAYOUTS = ("files", "subfolders", "classes")
VIEWS = ("radiological", "neurological")
"""Choices of options."""

PLAIN_WIDTH = 500
"""Characters of a line of a table that goes to a file or a pipe."""

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
    """Return an option in a group of the help."""
    return typer.Option(*names, help=help, rich_help_panel=group, **settings)


def _choice(group: str, help: str, choices: Sequence[str]) -> Any:
    """Return an option whose choices the help shows and the shell completes; the command itself checks the value."""

    def complete(incomplete: str) -> list[str]:
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
            from softdice.evaluation.labels import ScoreError
            from softdice.scoring.options import parse_options

            for option, value, choices in (
                ("--format", format, (None, *FORMATS)), ("--layout", layout, LAYOUTS), ("--view", view, VIEWS),
            ):  # fmt: skip
                if value not in choices:
                    wanted = ", ".join(filter(None, choices))
                    raise ScoreError(f"{option}: expected one of {wanted}, got {value!r}.")
            others = tuple(versus or ())
            task = Task(
                predictions, labels_path, layout, others, jobs, _check(format, rows, others, out, report, resume),
                rows, out, report, images, view, overwrite,
            )  # fmt: skip
            options = parse_options(
                labels, regions, ignore, include_background=include_background, threshold=threshold, soft=soft,
                resample=resample, ignore_geometry=ignore_geometry, transpose=transpose, scale=scale, round=round,
                empty=empty, missing=missing, metrics=metrics, surface=surface, penalty=penalty, lesions=lesions,
                matching=matching, centreline=centreline, instances=instances,
            )  # fmt: skip
            pairs = _pairs(task, (labels, regions, ignore, "--instances" if instances else None))
            exit_code = _score(task, pairs, options, _journal(task, options, resume=resume), run)
        if exit_code:
            raise typer.Exit(exit_code)


@dataclass(frozen=True)
class Task:
    """Which files are read, and what is written where."""

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
    """Raise ScoreError if options do not fit together, whatever the files hold; return the format."""
    from softdice.evaluation.labels import ScoreError
    from softdice.scoring.output_files import format_of, is_stream

    if versus and format == "nnunet":
        raise ScoreError("--format nnunet: expected one folder of predictions, got --versus. Take --format json.")
    if resume and (out is None or is_stream(out)):
        advice = "Name the file of the stopped run: its cases are beside it."
        raise ScoreError(f"--resume: expected --out with a file, got none. {advice}")
    if out is None and sys.stdout is None:
        raise ScoreError("score: expected a standard output, got a closed one. Pass --out.")
    for option, value, name in (("--versus", versus, "scipy"), ("--report", report, "PIL")):
        if value:
            package(option, name, "score")
    kind = format_of(out, format)
    if rows is not None and (rows not in ROWS or kind not in ("csv", "json")):
        raise ScoreError(f"--rows: expected one of {', '.join(ROWS)}, with --format csv or json, got {rows!r}.")
    return kind


def _pairs(task: Task, label_options: Sequence[str | None]) -> dict[str, list[Pair]]:
    """Return the pairs of each set of predictions, once it is sure that no file is overwritten by mistake.

    Args:
        label_options: options that say something about labels; some may name JSON files.
    """
    from softdice.evaluation.labels import ScoreError
    from softdice.images.files import stored
    from softdice.scoring import pair_files
    from softdice.scoring.output_files import check_places

    if task.images is not None and not (task.images.is_dir() and task.report):
        raise ScoreError(f"--images: expected a folder, with --report, got {str(task.images)!r}.")
    if task.layout == "classes" and (any(label_options) or task.format == "nnunet"):
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
        (*files, *_images(task).values(), *(Path(text) for text in label_options if text and text.endswith(".json"))),
        overwrite=task.overwrite,
    )
    return pairs


def _images(task: Task) -> dict[str, Path]:
    """Return the image of each case."""
    if task.images is None:
        return {}
    from softdice.scoring.pairing import case_files

    return case_files(task.images, deep=task.layout != "files")


def _journal(task: Task, options: Options, *, resume: bool) -> Journal | None:
    """Open the journal beside --out; None if the result goes to a stream."""
    from softdice.scoring.journal import Journal
    from softdice.scoring.output_files import is_stream

    if task.out is None or is_stream(task.out):
        return None
    about = [str(path.resolve()) for path in (task.predictions, task.truth, *task.versus)]
    return Journal(task.out.with_name(task.out.name + ".partial"), options, about, resume=resume)


def _score(task: Task, pairs: dict[str, list[Pair]], options: Options, journal: Journal | None, run: Run) -> int:
    """Score all pairs, write the results, and list what failed; return the exit code."""
    from softdice.evaluation.text import shown
    from softdice.scoring import compare, summarise, tabulate
    from softdice.scoring.output_files import save
    from softdice.scoring.summary import renumbered_line, unnamed_line
    from softdice.scoring.text_tables import done_line

    total = sum(map(len, pairs.values()))
    tables: dict[str, Table] = {}
    with _ctrl_c() as pressed, _progress(total) as step:

        def until_pressed(cases: Iterable[Case]) -> Iterator[Case]:
            for case in cases:
                step(case.case)
                yield case
                if pressed:
                    return

        for side, side_pairs in pairs.items():
            if not (pressed and tables):
                cases = _cases(side, side_pairs, journal, lambda remaining: run(remaining, options, jobs=task.jobs))
                tables[side] = tabulate(
                    until_pressed(cases), options.keys, options.names, empty=options.empty, metrics=options.metrics
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
    """Yield a line for each folder that holds other files than those of the pairs."""
    from softdice.images.files import FileError, left_out
    from softdice.scoring.pair_loading import class_files
    from softdice.scoring.pairing import case_folders

    read = [path for side in pairs.values() for pair in side for path in (pair.prediction, pair.truth) if path]
    for folder in [path for path in read if path.is_dir()] if task.layout == "classes" else ():
        with suppress(FileError):  # reported as the error of its case
            read += class_files(folder).values()
    for root in dict.fromkeys((*map(Path, pairs), task.truth)):
        for folder, files in case_folders(root, read, task.layout).items():
            if line := left_out(folder, files):
                yield line


def _cases(
    side: str, pairs: list[Pair], journal: Journal | None, run: Callable[[list[Pair]], Generator[Case, None, None]]
) -> Iterator[Case]:
    """Yield cases in the order of the pairs: those in the journal, and the others as they are scored."""
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
    """Give a list that a Ctrl-C fills, so that the case at hand can finish; a second Ctrl-C stops at once.

    Under torchrun only the first counts: torchrun passes on a Ctrl-C that its processes have had already, and ends them
    itself if they do not stop.
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
    """Show a bar on a terminal, and give a function to call with the name of each case."""
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
    """Write the result in its format to --out or to standard output."""
    from softdice.scoring import formats
    from softdice.scoring.output_files import save

    if task.format == "table":
        text = _table_text(tables, summaries, comparisons, plain=task.out is not None)
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
        sys.stdout.flush()  # raises here if the pipe is closed
    else:
        save(task.out, text)


def _table_text(
    tables: dict[str, Table], summaries: dict[str, Summary], comparisons: list[Comparison], *, plain: bool
) -> Iterator[str]:
    """Yield the tables as text, in the colours and the width of the terminal unless `plain`."""
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
        lines = [alone_line(comparison)]
        if different := different_lines(first, comparison):
            lines += ["Cases that differ most:", *(f"  {line}" for line in different)]
        yield "".join(f"{line}\n" for line in lines if line)
    yield "".join(f"{line}\n" for line in (rank_line(tables),) if line)
