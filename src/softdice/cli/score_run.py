"""What `softdice score` does, after its options are read: find the pairs, score them, write the results.

A side is one set of predictions: first PREDICTIONS, then each --versus. Dicts by side have its path, as the user typed
it, as their key, and keep this order. The journal is a file beside --out that keeps finished cases for --resume.
"""

from __future__ import annotations

import io
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from softdice.cli.progress import drawn
from softdice.cli.score import ROWS
from softdice.evaluation.labels import ScoreError
from softdice.evaluation.table import Table
from softdice.evaluation.text import shown
from softdice.images.files import FileError, left_out, stored
from softdice.parallel.ranks import Ranks
from softdice.scoring import formats, text_tables
from softdice.scoring.comparison import Comparison, compare
from softdice.scoring.confidence import Ranking, rankings, read_confidence
from softdice.scoring.journal import Journal
from softdice.scoring.options import Options
from softdice.scoring.output_files import check_places, format_of, is_stream, save
from softdice.scoring.pair_loading import class_files
from softdice.scoring.pair_scores import Case
from softdice.scoring.pairing import Pair, case_files, case_folders, check_layout, pair_files
from softdice.scoring.report import to_html
from softdice.scoring.summary import Summary, renumbered_line, summarise, tabulate, unnamed_line, unused_tolerances_line
from softdice.scoring.torchrun import Run
from softdice.validation import package

PLAIN_WIDTH = 500
"""Characters of a line of a table that goes to a file or a pipe."""


@dataclass(frozen=True)
class Task:
    """The files and the output options of a run, as the user typed them; `Options` has how to score.

    Args:
        predictions, truth: the arguments PREDICTIONS and LABELS, the reference.
        versus: other predictions of the same cases. layout, images, view: as in `pair_files` and `to_html`.
        jobs: processes. overwrite, resume: flags of the command.
        format, rows: words of `softdice.cli.score.FORMATS` and `ROWS`, None where the option is left out.
        out: None for standard output. report: file of the HTML report. confidence: CSV of `softdice predict`.
    """

    predictions: Path
    truth: Path
    layout: str
    versus: tuple[Path, ...]
    jobs: int
    format: str | None
    rows: str | None
    out: Path | None
    report: Path | None
    images: Path | None
    view: str
    overwrite: bool
    confidence: Path | None
    resume: bool

    def case_images(self) -> dict[str, Path]:
        """Return the file in --images for each case."""
        return {} if self.images is None else case_files(self.images, deep=self.layout != "files")


def check_options(task: Task) -> Task:
    """Return the task with its format chosen, before any file is read.

    Raise ScoreError if options do not fit together, ModuleNotFoundError if one needs a package that is not installed.
    """
    if task.versus and task.format == "nnunet":
        raise ScoreError("--format nnunet: expected one folder of predictions, got --versus. Take --format json.")
    if task.resume and (task.out is None or is_stream(task.out)):
        advice = "Name the file of the stopped run: its cases are beside it."
        raise ScoreError(f"--resume: expected --out with a file, got none. {advice}")
    if task.out is None and sys.stdout is None:
        raise ScoreError("score: expected a standard output, got a closed one. Pass --out.")
    needed = (("--versus", task.versus, "scipy"), ("--report", task.report, "PIL"))
    for option, value, name in (*needed, ("--confidence", task.confidence, "scipy")):
        if value:
            package(option, name, "score")  # raises ModuleNotFoundError without it
    format = format_of(task.out, task.format)
    if task.rows is not None and (task.rows not in ROWS or format not in ("csv", "json")):
        raise ScoreError(f"--rows: expected one of {', '.join(ROWS)}, with --format csv or json, got {task.rows!r}.")
    return replace(task, format=format)


def run_task(task: Task, label_options: Sequence[str | None], options: Options, run: Run) -> int:
    """Score all pairs of a task that `check_options` returned, write the results, and list what failed.

    Args:
        label_options: texts of --labels, --regions, --ignore and --instances; some may name JSON files.
        run: `runner.run`, or under torchrun a function like it that uses all ranks.

    Return the exit code: 0, 1 if a pair was not scored, 130 if Ctrl-C ended the run. Raise ScoreError for folders and
    files that cannot be used, before anything is scored.
    """
    pairs = _find_pairs(task, label_options)
    confidence_rows: dict[str, dict[str, float]] = {}
    if task.confidence is not None:
        confidence_rows = read_confidence(task.confidence, [pair.prediction for pair in pairs[str(task.predictions)]])
    journal = _open_journal(task, options)
    tables = _score_sides(task, pairs, options, journal, run)
    total = sum(map(len, pairs.values()))
    done = sum(len(table.cases) + len(table.errors) for table in tables.values())
    if done < total and journal is not None:
        journal.close(finished=False)
        print(f"Stopped after {done} of {total}. The same command with --resume goes on from there.", file=sys.stderr)
        return 130
    summaries = {side: summarise(table) for side, table in tables.items()}
    first, *others = tables.values()
    comparisons = [compare(first, other) for other in others]
    ranked = rankings(first, confidence_rows) if confidence_rows else []
    _write(task, tables, summaries, comparisons, options, ranked)
    if journal is not None:
        journal.close(finished=True)
    if task.report is not None:
        command = shlex.join(["softdice", *sys.argv[1:]])
        page = to_html(
            tables, summaries, comparisons, options, str(task.truth),
            command=command, images=task.case_images(), view=task.view, rankings=ranked,
        )  # fmt: skip
        save(task.report, [page])
    if ranked:
        print(ranked[0].line(), file=sys.stderr)
    _print_remarks(tables, options, _left_out(task, pairs), total)
    if task.out is not None or task.report is not None:
        print(text_tables.done_line(tables, summaries, task.out, task.report), file=sys.stderr)
    if done < total:
        print(f"Stopped after {done} of {total}: these are the scores so far.", file=sys.stderr)
        return 130
    return 1 if any(table.errors for table in tables.values()) else 0


def _find_pairs(task: Task, label_options: Sequence[str | None]) -> dict[str, list[Pair]]:
    """Return the pairs of each side.

    `label_options` are the texts of --labels, --regions, --ignore and --instances, some of which name a JSON file.

    Raise ScoreError for options that exclude each other, folders without a name in common, and an output that would
    replace an input or a file that is no result.
    """
    if task.images is not None and not (task.images.is_dir() and task.report):
        raise ScoreError(f"--images: expected a folder, with --report, got {str(task.images)!r}.")
    check_layout(task.layout, (*label_options, "nnunet" if task.format == "nnunet" else None))
    sides = (task.predictions, *task.versus)
    for i, side in enumerate(sides):
        same = next((other for other in sides[:i] if other.resolve() == side.resolve()), None)
        if same is not None:
            raise ScoreError(f"--versus: expected other predictions than {same}, got the same.")
    pairs = {str(side): pair_files(side, task.truth, task.layout) for side in sides}
    masks = {stored(path) for path in _mask_paths(pairs)}  # of an image in a collection, the collection
    mask_files = (file for path in masks for file in (path.iterdir() if path.is_dir() else (path,)))
    tables_of_labels = (Path(text) for text in label_options if text and text.endswith(".json"))
    inputs = chain(mask_files, task.case_images().values(), tables_of_labels, filter(None, [task.confidence]))
    check_places(task.out, task.report, inputs, overwrite=task.overwrite)
    return pairs


def _mask_paths(pairs: dict[str, list[Pair]]) -> list[Path]:
    """Return the predictions and references of all pairs of all sides."""
    return [path for pair in chain(*pairs.values()) for path in (pair.prediction, pair.truth) if path]


def _open_journal(task: Task, options: Options) -> Journal | None:
    """Open the journal beside --out, None if the result goes to a stream; raise ScoreError as `Journal` does."""
    if task.out is None or is_stream(task.out):
        return None
    folders = [str(path.resolve()) for path in (task.predictions, task.truth, *task.versus)]
    return Journal(task.out.with_name(task.out.name + ".partial"), options, folders, resume=task.resume)


def _score_sides(
    task: Task, pairs: dict[str, list[Pair]], options: Options, journal: Journal | None, run: Run
) -> dict[str, Table]:
    """Score the pairs of each side and return its table, with a bar of progress on a terminal.

    Ctrl-C ends the scoring after the current case: the current side has a shorter table, later sides have no table.
    `run` yields the cases of pairs, as `runner.run`. `journal` is None if the result goes to a stream.
    """
    tables: dict[str, Table] = {}
    with _ctrl_c() as pressed, _progress(sum(map(len, pairs.values()))) as step:

        def until_pressed(cases: Iterable[Case]) -> Iterator[Case]:
            """Yield the cases up to the one at which Ctrl-C was pressed, each with a step of the bar."""
            for case in cases:
                step(case.case)
                yield case
                if pressed:
                    return

        for side, side_pairs in pairs.items():
            if not (pressed and tables):  # the first side gets a table even if Ctrl-C came before it
                cases = _cases(side, side_pairs, journal, partial(run, options=options, jobs=task.jobs))
                tables[side] = tabulate(
                    until_pressed(cases), options.keys, options.names, empty=options.empty, metrics=options.metrics
                )
    return tables


def _cases(side: str, pairs: list[Pair], journal: Journal | None, run: Run) -> Iterator[Case]:
    """Yield the cases of a side in the order of its pairs: from the journal, else scored by `run` and added to it.

    `run` takes a list of pairs and yields their cases. `journal.done` holds the cases of an earlier run by side and
    name of the case; each is removed when it is yielded, to free its memory.
    """
    done = {} if journal is None else journal.done
    with closing(run([pair for pair in pairs if (side, pair.case) not in done])) as scored:
        for pair in pairs:
            case = done.pop((side, pair.case), None)
            if case is None:
                case = next(scored)
                if journal is not None:
                    journal.add(side, case)
            yield case


def _print_remarks(tables: dict[str, Table], options: Options, left_out_lines: Iterable[str], total: int) -> None:
    """Print on standard error what to know about labels, files that were not read, and errors; `total` counts pairs."""
    lines = unnamed_line(next(iter(tables.values()))), renumbered_line(tables.values())
    for line in filter(None, (*lines, unused_tolerances_line(tables.values(), options))):
        print(shown(line), file=sys.stderr)
    empty = sum(prediction == "" for table in tables.values() for prediction in table.predictions)
    if empty:
        print(f"Without a prediction, scored as an empty one: {empty} of {total}", file=sys.stderr)
    for line in left_out_lines:
        print(shown(line), file=sys.stderr)
    errors = [error for table in tables.values() for error in table.errors]
    if errors:
        print(f"Not scored: {len(errors)} of {total}", *map(shown, errors), sep="\n  ", file=sys.stderr)


def _left_out(task: Task, pairs: dict[str, list[Pair]]) -> Iterator[str]:
    """Yield a line that names the files of a folder that belong to no pair, for each folder that has such files."""
    read = _mask_paths(pairs)  # with --layout classes, folders: their masks are added here
    for folder in [path for path in read if path.is_dir()] if task.layout == "classes" else ():
        with suppress(FileError):  # reported as the error of its case
            read += class_files(folder).values()
    for root in dict.fromkeys((*map(Path, pairs), task.truth)):
        for folder, files in case_folders(root, read, task.layout).items():
            if line := left_out(folder, files):
                yield line


@contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Yield a list that is empty until Ctrl-C is pressed, so that the case at hand can finish; a second stops at once.

    The second raises KeyboardInterrupt. Under torchrun only the first counts: torchrun passes on a Ctrl-C that its
    processes have had already, and ends them itself if they do not stop.
    """
    pressed: list[bool] = []

    def press(*_: object) -> None:
        if pressed and Ranks.here() is None:
            raise KeyboardInterrupt
        pressed.append(True)

    previous_handler = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous_handler)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` cases on a terminal, and yield a function to call with the name of each finished case."""
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
    ranked: list[Ranking],
) -> None:
    """Write the result in its format to --out or to standard output; nnU-Net's format holds the first side only.

    Args:
        comparisons: the first side with each other one.
        ranked: rankings of the first side's masks by --confidence, for all classes and each; JSON alone shows them.

    Raise OSError if the file cannot be written, or the reader of the pipe is gone.
    """
    if task.format == "table":
        text = _table_text(tables, summaries, comparisons, plain=task.out is not None)
    elif task.format == "csv":
        text = formats.to_csv(tables, summaries, task.rows or "pairs")
    elif task.format == "json" and task.rows is not None:
        text = formats.to_json_rows(tables, summaries, task.rows)
    elif task.format == "json":
        text = formats.to_json(tables, summaries, comparisons, options, ranked)
    else:
        text = formats.to_nnunet(next(iter(tables.values())), options)
    if task.out is None:
        # a file's name may hold surrogates (bytes that are no UTF-8), which the stream would refuse: escape them
        sys.stdout.writelines(piece.encode("utf-8", "backslashreplace").decode() for piece in text)
        sys.stdout.flush()  # raises here if the pipe is closed
    else:
        save(task.out, text)


def _table_text(
    tables: dict[str, Table], summaries: dict[str, Summary], comparisons: list[Comparison], *, plain: bool
) -> Iterator[str]:
    """Yield the tables as text: all sides by rank, the means of each, and each comparison with the first.

    Standard output decides colours and width: a terminal has its own, a file or pipe `PLAIN_WIDTH` without colours.
    `plain`: the text goes to --out, so there are no colours either.
    """
    console = Console(file=io.StringIO()) if plain else Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH)

    def text(title: str, grid: text_tables.Grid) -> str:
        """Return what a terminal shows for a table."""
        with console.capture() as captured:
            console.print(text_tables.terminal(title, grid, console.width))
        return captured.get()

    if len(tables) > 1:
        yield text("all predictions", text_tables.models_grid(tables, [*summaries.values()]))
    for side, table in tables.items():
        yield text(side, text_tables.class_grid(table, summaries[side]))
    side, first = next(iter(tables.items()))
    for name, comparison in zip(list(tables)[1:], comparisons, strict=True):
        title = f"{side} minus {name}"
        yield text(title, text_tables.comparison_grid(first, comparison))
        if comparison.shapes:
            yield text(f"{title}: shapes", text_tables.shapes_grid(first, comparison))
        remarks = (text_tables.alone_line(comparison), *text_tables.different_lines(first, comparison))
        yield from (f"{line}\n" for line in remarks if line)
    if ranks := text_tables.rank_line(tables):
        yield f"{ranks}\n"
