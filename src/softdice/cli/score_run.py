"""What `softdice score` does, after its options are read: find the pairs, score them, write the results."""

from __future__ import annotations

import io
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
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
from softdice.scoring import formats
from softdice.scoring.comparison import Comparison, compare
from softdice.scoring.confidence import Ranking, rankings, read_confidence
from softdice.scoring.journal import Journal
from softdice.scoring.options import Options
from softdice.scoring.output_files import check_places, format_of, is_stream, save
from softdice.scoring.pair_loading import class_files
from softdice.scoring.pair_scores import Case
from softdice.scoring.pairing import Pair, case_files, case_folders, pair_files
from softdice.scoring.report import to_html
from softdice.scoring.summary import Summary, renumbered_line, summarise, tabulate, unnamed_line
from softdice.scoring.text_tables import (
    Grid,
    alone_line,
    class_grid,
    comparison_grid,
    different_lines,
    done_line,
    models_grid,
    rank_line,
    shapes_grid,
    terminal,
)
from softdice.scoring.torchrun import Run
from softdice.validation import package

PLAIN_WIDTH = 500
"""Characters of a line of a table that goes to a file or a pipe."""


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
    confidence: Path | None


def check_options(
    format: str | None,
    rows: str | None,
    versus: tuple[Path, ...],
    out: Path | None,
    report: Path | None,
    resume: bool,
    confidence: Path | None,
) -> str:
    """Raise ScoreError if options do not fit together, whatever the files hold; return the format."""
    if versus and format == "nnunet":
        raise ScoreError("--format nnunet: expected one folder of predictions, got --versus. Take --format json.")
    if resume and (out is None or is_stream(out)):
        advice = "Name the file of the stopped run: its cases are beside it."
        raise ScoreError(f"--resume: expected --out with a file, got none. {advice}")
    if out is None and sys.stdout is None:
        raise ScoreError("score: expected a standard output, got a closed one. Pass --out.")
    for option, value, name in (
        ("--versus", versus, "scipy"),
        ("--report", report, "PIL"),
        ("--confidence", confidence, "scipy"),
    ):
        if value:
            package(option, name, "score")
    kind = format_of(out, format)
    if rows is not None and (rows not in ROWS or kind not in ("csv", "json")):
        raise ScoreError(f"--rows: expected one of {', '.join(ROWS)}, with --format csv or json, got {rows!r}.")
    return kind


def find_pairs(task: Task, label_options: Sequence[str | None]) -> dict[str, list[Pair]]:
    """Return the pairs of each set of predictions, once it is sure that no file is overwritten by mistake.

    Args:
        label_options: options that say something about labels; some may name JSON files.
    """
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
        (
            *files,
            *_images(task).values(),
            *(Path(text) for text in label_options if text and text.endswith(".json")),
            *filter(None, [task.confidence]),
        ),
        overwrite=task.overwrite,
    )
    return pairs


def _images(task: Task) -> dict[str, Path]:
    """Return the image of each case."""
    if task.images is None:
        return {}
    return case_files(task.images, deep=task.layout != "files")


def known_confidence(task: Task, pairs: dict[str, list[Pair]]) -> dict[str, dict[str, float]]:
    """Return the rows of --confidence by the names of the masks of the first predictions; {} without the option."""
    if task.confidence is None:
        return {}
    return read_confidence(task.confidence, [pair.prediction for pair in pairs[str(task.predictions)]])


def open_journal(task: Task, options: Options, *, resume: bool) -> Journal | None:
    """Open the journal beside --out; None if the result goes to a stream."""
    if task.out is None or is_stream(task.out):
        return None
    about = [str(path.resolve()) for path in (task.predictions, task.truth, *task.versus)]
    return Journal(task.out.with_name(task.out.name + ".partial"), options, about, resume=resume)


def run_task(
    task: Task,
    pairs: dict[str, list[Pair]],
    options: Options,
    journal: Journal | None,
    run: Run,
    sure: dict[str, dict[str, float]],
) -> int:
    """Score all pairs, write the results, and list what failed; return the exit code."""
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
    ranked = rankings(first, sure) if sure else []
    _write(task, tables, summaries, comparisons, options, ranked)
    if journal is not None:
        journal.close(finished=True)
    if task.report is not None:
        command = shlex.join(["softdice", *sys.argv[1:]])
        page = to_html(
            tables, summaries, comparisons, options, str(task.truth),
            command=command, images=_images(task), view=task.view, rankings=ranked,
        )  # fmt: skip
        save(task.report, [page])
    if ranked:
        print(ranked[0].line(), file=sys.stderr)
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
    """Write the result in its format to --out or to standard output."""
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
        sys.stdout.writelines(piece.encode("utf-8", "backslashreplace").decode() for piece in text)
        sys.stdout.flush()  # raises here if the pipe is closed
    else:
        save(task.out, text)


def _table_text(
    tables: dict[str, Table], summaries: dict[str, Summary], comparisons: list[Comparison], *, plain: bool
) -> Iterator[str]:
    """Yield the tables as text, in the colours and the width of the terminal unless `plain`."""
    console = Console(file=io.StringIO()) if plain else Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH)

    def text(title: str, grid: Grid) -> str:
        with console.capture() as captured:
            console.print(terminal(title, grid, console.width))
        return captured.get()

    if len(tables) > 1:
        yield text("all predictions", models_grid(tables, [*summaries.values()]))
    for side, table in tables.items():
        yield text(side, class_grid(table, summaries[side]))
    first = next(iter(tables.values()))
    for name, comparison in zip(list(tables)[1:], comparisons, strict=True):
        title = "first minus second" if len(tables) == 2 else f"first minus {name}"
        yield text(title, comparison_grid(first, comparison))
        if comparison.shapes:
            yield text(f"{title}: shapes", shapes_grid(first, comparison))
        yield from (f"{line}\n" for line in (alone_line(comparison), *different_lines(first, comparison)) if line)
    yield from (f"{line}\n" for line in (rank_line(tables),) if line)
