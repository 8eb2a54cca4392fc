"""The Dice coefficient and its family as losses and scores for PyTorch."""

from softdice.version import __version__

__all__ = ["__version__"]
