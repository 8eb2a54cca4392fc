"""Scores of folders of masks, as `softdice score` computes them."""

from softdice.scoring.cases import Case, score_pair
from softdice.scoring.classes import Options, ScoreError
from softdice.scoring.folders import Scores, score_folders
from softdice.scoring.pairing import Pair, pair_files
from softdice.scoring.runner import run
from softdice.scoring.summary import Comparison, Summary, Table, compare, summarise, tabulate

__all__ = [
    "Case",
    "Comparison",
    "Options",
    "Pair",
    "ScoreError",
    "Scores",
    "Summary",
    "Table",
    "compare",
    "pair_files",
    "run",
    "score_folders",
    "score_pair",
    "summarise",
    "tabulate",
]
