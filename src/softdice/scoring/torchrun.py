"""Score pairs on all processes that torchrun started; rank 0 gets the cases of all ranks, in order.

Rank 0 alone lists the folders, keeps the journal and writes. Each of n ranks scores every n-th pair. After each case
the ranks exchange theirs, so that a run that is stopped loses no finished case.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from softdice.evaluation.labels import ScoreError
from softdice.parallel.ranks import LostRankError, Ranks
from softdice.scoring import runner
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case
from softdice.scoring.pairing import Pair

Run = Callable[..., Generator[Case, None, None]]


class _Message(NamedTuple):
    """What a rank sends after each case: the case, why it cannot go on, or that all are to stop."""

    case: Case | None = None
    problem: str = ""
    stop: bool = False


@contextmanager
def sharing() -> Iterator[Run | None]:
    """Give rank 0 a function that runs like `runner.run` on all ranks; on the others, work for rank 0, then give None.

    Without torchrun, give `runner.run` itself.
    """
    ranks = Ranks.here()
    if ranks is None or ranks.count == 1:
        yield runner.run
        return
    with ranks:
        if ranks.rank > 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
            with suppress(LostRankError):  # rank 0 is gone, and has said why
                _serve(ranks)
            yield None
            return
        first = _First(ranks)
        try:
            yield first.run
        finally:
            with suppress(LostRankError):  # another rank is gone: `run` has reported it
                first.stop()
                ranks.from_first(None)


@dataclass
class _First:
    """Rank 0's side; `running` is true while the others wait for an exchange."""

    ranks: Ranks
    running: bool = False

    def run(self, pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
        """Score pairs on all ranks; arguments and cases are those of `runner.run`."""
        try:
            self.ranks.from_first((list(pairs), options, jobs))
            self.running = len(pairs) > 0
            for number, messages in enumerate(_rounds(self.ranks, pairs, options, jobs), 1):
                self.running = number * self.ranks.count < len(pairs)
                problems = (f"rank {rank}: {one.problem}" for rank, one in enumerate(messages) if one.problem)
                if problem := next(problems, ""):
                    self.running = False
                    raise ScoreError(problem)
                yield from (message.case for message in messages if message.case is not None)
        except LostRankError as error:
            self.running = False
            raise ScoreError(
                "score: expected every process to score its cases, but one has ended: its own message says why. With "
                "--out, --resume goes on from here."
            ) from error
        finally:
            self.stop()

    def stop(self) -> None:
        """Make the other ranks leave the remaining pairs."""
        if self.running:
            self.running = False
            self.ranks.gather(_Message(stop=True))


def _serve(ranks: Ranks) -> None:
    """Score this rank's share of the pairs that rank 0 sends, until rank 0 sends None."""
    while (task := ranks.from_first(None)) is not None:
        for messages in _rounds(ranks, *task):
            if any(message.stop or message.problem for message in messages):
                break


def _rounds(ranks: Ranks, pairs: Sequence[Pair], options: Options, jobs: int) -> Iterator[list[_Message]]:
    """Score this rank's share; after each case yield the messages of all ranks, in the order of the pairs."""
    mine = runner.run(pairs[ranks.rank :: ranks.count], options, jobs=jobs)
    try:
        for _ in range(0, len(pairs), ranks.count):
            try:
                message = _Message(next(mine, None))
            except ScoreError as error:
                message = _Message(problem=str(error))
            yield ranks.gather(message)
    finally:
        mine.close()
