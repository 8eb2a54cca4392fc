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
"""`runner.run`, or a function with its arguments and cases."""


class _Message(NamedTuple):
    """What a rank sends after each case: the case, why it cannot go on, or that all are to stop."""

    case: Case | None = None
    problem: str = ""
    stop: bool = False


@contextmanager
def sharing() -> Iterator[Run | None]:
    """Yield, on rank 0, a function like `runner.run` that uses all ranks; on others score for it, then yield None.

    Without torchrun, yield `runner.run` itself.
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
                ranks.from_first(None)  # ends `_serve`


@dataclass
class _First:
    """Rank 0's side of `_serve`. `running`: the other ranks wait for rank 0 to exchange messages, and need a stop."""

    ranks: Ranks
    running: bool = False

    def run(self, pairs: Sequence[Pair], options: Options, *, jobs: int = 1) -> Generator[Case, None, None]:
        """Score pairs on all ranks and yield their cases in order, as `runner.run` with the same arguments.

        A round is a pair of each rank. Raise ScoreError, with all ranks stopped, if a rank has a problem or has ended.
        """
        try:
            self.ranks.from_first((list(pairs), options, jobs))
            self.running = len(pairs) > 0
            for rounds_done, messages in enumerate(_rounds(self.ranks, pairs, options, jobs), 1):
                self.running = rounds_done * self.ranks.count < len(pairs)  # not after the last round
                for rank, message in enumerate(messages):
                    if message.problem:
                        self.running = False
                        raise ScoreError(f"rank {rank}: {message.problem}")
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
    """Score this rank's share of the pairs that rank 0 sends, run by run, until rank 0 sends None."""
    while (task := ranks.from_first(None)) is not None:
        for messages in _rounds(ranks, *task):
            if any(message.stop or message.problem for message in messages):
                break


def _rounds(ranks: Ranks, pairs: Sequence[Pair], options: Options, jobs: int) -> Iterator[list[_Message]]:
    """Score this rank's share; after each case yield the messages of all ranks, in the order of the pairs.

    A rank that has no pair in the last round sends an empty message.
    """
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
