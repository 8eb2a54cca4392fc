"""Scores of folders of masks, as `softdice score` computes them."""

from softdice.evaluation.labels import ScoreError
from softdice.evaluation.table import Table
from softdice.scoring.comparison import Comparison, compare
from softdice.scoring.folders import Scores, score_folders
from softdice.scoring.options import Options
from softdice.scoring.pair_scores import Case, score_pair
from softdice.scoring.pairing import Pair, pair_files
from softdice.scoring.runner import run
from softdice.scoring.summary import Summary, summarise, tabulate

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
