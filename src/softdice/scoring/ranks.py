"""pairs -> cases, shared out over the processes that torchrun started. Rank 0 gets them all, in order.

Rank 0 alone reads the folders, keeps the journal and writes. The others wait for its pairs and score every count-th of
them; after each case the ranks exchange what they have, so that nothing done is lost when the run is stopped.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from softdice.parallel.ranks import LostRankError, Ranks
from softdice.scoring import runner
from softdice.scoring.cases import Case
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.pairing import Pair

Run = Callable[..., Generator[Case, None, None]]


class _Word(NamedTuple):
    """What a rank says after each case."""

    case: Case | None = None
    problem: str = ""
    stop: bool = False


@contextmanager
def sharing() -> Iterator[Run | None]:
    """() -> what to call in the place of `runner.run`; None on the ranks but the first, when they have done their work.

    Without torchrun that is `runner.run` itself.
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
            with suppress(LostRankError):  # another rank is gone, which run has told
                first.stop()
                ranks.from_first(None)


@dataclass
class _First:
    """Rank 0's side; `running` while the others expect an exchange."""

    ranks: Ranks
    running: bool = False

    def run(self, pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
        """As `runner.run`."""
        try:
            self.ranks.from_first((list(pairs), options, jobs))
            self.running = len(pairs) > 0
            for number, words in enumerate(_rounds(self.ranks, pairs, options, jobs), 1):
                self.running = number * self.ranks.count < len(pairs)
                problem = next((f"rank {rank}: {word.problem}" for rank, word in enumerate(words) if word.problem), "")
                if problem:
                    self.running = False
                    raise ScoreError(problem)
                yield from (word.case for word in words if word.case is not None)
        except LostRankError as problem:
            self.running = False
            raise ScoreError(
                "score: expected every process to score its cases, but one has ended: its own message says why. With "
                "--out, --resume goes on from here."
            ) from problem
        finally:
            self.stop()

    def stop(self) -> None:
        """The others leave the pairs that are left."""
        if self.running:
            self.running = False
            self.ranks.gather(_Word(stop=True))


def _serve(ranks: Ranks) -> None:
    """Score this rank's share of whatever rank 0 has to score, until it has nothing more."""
    while (task := ranks.from_first(None)) is not None:
        for words in _rounds(ranks, *task):
            if any(word.stop or word.problem for word in words):
                break


def _rounds(ranks: Ranks, pairs: Sequence[Pair], options: Options, jobs: int) -> Iterator[list[_Word]]:
    """After each case of this rank, what all ranks have: cases in the order of the pairs."""
    mine = runner.run(pairs[ranks.rank :: ranks.count], options, jobs=jobs)
    try:
        for _ in range(0, len(pairs), ranks.count):
            try:
                word = _Word(next(mine, None))
            except ScoreError as problem:
                word = _Word(problem=str(problem))
            yield ranks.gather(word)
    finally:
        mine.close()
