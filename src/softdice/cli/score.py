"""`softdice score`: the Dice coefficient and friends for folders of masks."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from softdice.distributed import Ranks
from softdice.images.files import written_beside

if TYPE_CHECKING:
    from softdice.scoring import Case, Comparison, Options, Pair, Summary, Table
    from softdice.scoring.ranks import Run
    from softdice.scoring.runner import Journal

FORMATS = ("table", "csv", "json", "nnunet")

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def score(
    predictions: Annotated[Path, typer.Argument(help="A mask, or a folder of masks.")],
    labels_path: Annotated[Path, typer.Argument(metavar="LABELS", help="The reference: a mask, or a folder of them.")],
    versus: Annotated[Path | None, typer.Option(help="Other predictions of the same cases, to compare with.")] = None,
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
    soft: Annotated[bool, typer.Option("--soft", help="Predictions are probabilities: soft Dice.")] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring predictions to the grid of the label (NIfTI).")
    ] = False,
    ignore_geometry: Annotated[
        bool, typer.Option("--ignore-geometry", help="Compare voxels by position, whatever the affines say.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes. The results do not depend on it.", min=1)] = 1,
    format: Annotated[
        str | None, typer.Option(help="table, csv, json or nnunet (its summary.json). Default: by --out, else table.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result; else standard output.")] = None,
    report: Annotated[Path | None, typer.Option(help="File for a report in HTML, one page with pictures.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --out: go on where a stopped run ended.")] = False,
) -> None:
    """Score masks against labels: Dice and IoU per case and class, means with intervals, pooled.

    A class that is in neither mask of a case is not scored there, one that is in only one of them scores 0.
    Exit code 0: all scored; 1: some files could not be scored, they are listed at the end; 2: wrong usage.
    """
    from softdice.scoring.ranks import sharing

    with sharing() as run:
        if run is None:  # a rank that torchrun started beside the first
            return
        from softdice.scoring import pair_files
        from softdice.scoring.classes import Options, ScoreError, parse_labels, parse_numbers, parse_regions
        from softdice.scoring.runner import Journal

        if format is None:
            format = {".csv": "csv", ".json": "json"}.get(out.suffix.lower(), "table") if out else "table"
        try:
            _check(format, out, report, resume, versus, threshold, soft, resample, ignore_geometry)
            parsed, names, unions = parse_labels(labels) if labels else (None, {}, {})
            if regions:
                unions = parse_regions(regions)
            elif unions:  # a dataset.json with regions, as nnU-Net trains and scores them
                unions = {**{names[label]: (label,) for label in parsed or ()}, **unions}
            options = Options(
                labels=parsed,
                names=names,
                regions=unions or None,
                ignore=parse_numbers("--ignore", ignore) if ignore else (),
                include_background=include_background,
                threshold=threshold,
                soft=soft,
                resample=resample,
                ignore_geometry=ignore_geometry,
            )
            if (soft or threshold is not None) and len(unions or parsed or (1,)) != 1:
                raise ScoreError(
                    "--soft, --threshold: expected one class, got several. Name one with --labels or --regions."
                )
            journal = None
            if versus is not None and versus.resolve() == predictions.resolve():
                raise ScoreError(f"--versus: expected other predictions than {predictions}, got the same.")
            if out is not None:
                pair_files(predictions, labels_path)  # before the journal: a wrong path must not touch what is there
                about = [str(path.resolve()) if path else "" for path in (predictions, labels_path, versus)]
                journal = Journal(out.with_name(out.name + ".partial"), options, about, resume=resume)
            failed = _score(predictions, labels_path, versus, options, jobs, format, out, report, journal, run)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            raise typer.Exit(130) from None
        except (ScoreError, ModuleNotFoundError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
                raise
            print(" ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None
        if failed:
            raise typer.Exit(failed)


def _check(
    format: str, out: Path | None, report: Path | None, resume: bool, versus: Path | None, threshold: float | None,
    soft: bool, resample: bool, ignore_geometry: bool,
) -> None:  # fmt: skip
    from softdice.scoring.classes import ScoreError, require

    if format not in FORMATS:
        raise ScoreError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}.")
    if versus is not None and format == "nnunet":
        raise ScoreError("--format nnunet: expected one folder of predictions, got --versus. Take --format json.")
    if resume and out is None:
        raise ScoreError("--resume: expected --out, beside which a stopped run leaves its cases, got none.")
    for option, path in (("--out", out), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise ScoreError(
                f"{option}: expected a file in an existing folder, got {str(path)!r}. Make the folder first."
            )
    if soft and threshold is not None:
        raise ScoreError("score: expected --soft or --threshold, got both. Pass one of them.")
    if resample and ignore_geometry:
        raise ScoreError("score: expected --resample or --ignore-geometry, got both. Pass one of them.")
    for wanted, option, package in (
        (versus, "--versus", "scipy"), (resample, "--resample", "scipy"), (report, "--report", "PIL")
    ):  # fmt: skip
        if wanted:
            require(option, package)


def _score(
    predictions: Path, references: Path, versus: Path | None, options: Options, jobs: int, format: str,
    out: Path | None, report: Path | None, journal: Journal | None, run: Run,
) -> int:  # fmt: skip
    """Score, write, list what failed; the exit code."""
    from softdice.scoring import compare, pair_files, summarise, tabulate

    pairs = {str(side): pair_files(side, references) for side in (predictions, versus) if side is not None}
    keys, total = tuple(options.regions) if options.regions else options.labels, sum(map(len, pairs.values()))
    tables: dict[str, Table] = {}
    with _ctrl_c() as pressed, _progress(total) as step:

        def seen(cases: Iterable[Case]) -> Iterator[Case]:
            for case in cases:
                step(case.case)
                yield case
                if pressed:
                    return

        for side, found in pairs.items():
            if not pressed:
                tables[side] = tabulate(seen(_cases(side, found, options, jobs, journal, run)), keys, options.names)
    done = sum(len(table.cases) + len(table.errors) for table in tables.values())
    if done < total and journal is not None:
        journal.close(finished=False)
        print(f"Stopped after {done} of {total}. The same command with --resume goes on from there.", file=sys.stderr)
        return 130
    summaries = {side: summarise(table) for side, table in tables.items()}
    comparison = compare(*tables.values()) if len(tables) == 2 else None
    _write(tables, summaries, comparison, options, format, out)
    if journal is not None:
        journal.close(finished=True)
    if report is not None:
        from softdice.scoring.report import to_html

        _save(report, [to_html(tables, summaries, comparison, options, str(references))])
    errors = [error for table in tables.values() for error in table.errors]
    if errors:
        print(f"Not scored: {len(errors)} of {total}", *errors, sep="\n  ", file=sys.stderr)
    if done < total:
        print(f"Stopped after {done} of {total}: these are the scores so far.", file=sys.stderr)
        return 130
    return 1 if errors else 0


def _cases(
    side: str, pairs: list[Pair], options: Options, jobs: int, journal: Journal | None, run: Run
) -> Iterator[Case]:
    """Cases in the order of the pairs: those that a stopped run left, and the others scored now by `run`."""
    if journal is None:
        yield from run(pairs, options, jobs=jobs)
        return
    running = run([pair for pair in pairs if (side, pair.case) not in journal.done], options, jobs=jobs)
    try:
        for pair in pairs:
            case = journal.done.pop((side, pair.case), None)
            if case is None:
                case = next(running)
                journal.add(side, case)
            yield case
    finally:
        running.close()


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
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def _write(
    tables: dict[str, Table], summaries: dict[str, Summary], comparison: Comparison | None, options: Options,
    format: str, out: Path | None,
) -> None:  # fmt: skip
    from softdice.scoring import output
    from softdice.scoring.tables import class_table, comparison_table

    first = next(iter(tables.values()))
    if format == "table":
        console = Console(file=None if out is None else io.StringIO())
        if not console.is_terminal:
            console = Console(file=console.file, width=PLAIN_WIDTH)
        for side, table in tables.items():
            console.print(class_table(side, table, summaries[side]))
        if comparison is not None:
            console.print(comparison_table("first minus second", first, comparison))
        if out is not None and isinstance(console.file, io.StringIO):
            _save(out, [console.file.getvalue()])
        return
    if format == "csv":
        text = output.to_csv(tables)
    elif format == "json":
        text = output.to_json(tables, summaries, comparison, options)
    else:
        text = output.to_nnunet(first, options)
    if out is None:
        sys.stdout.writelines(text)
    else:
        _save(out, text)


def _save(path: Path, text: Iterable[str]) -> None:
    with written_beside(path) as file:
        file.writelines(piece.encode() for piece in text)
