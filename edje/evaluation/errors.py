"""What can be wrong with an evaluation; each message is a sentence for whoever runs it.

Errors:

    EvaluationError
      TaskInvalid       similarities, positives and k do not fit together
      ScoresUnusable    a scorer gave something that cannot be ranked
      RecallChanged     R@k differs before and after reranking, which no permutation of k candidates can do
      StorageImpossible the tokens cannot be held in the storage type asked for
      ScorerUnknown     there is no such scorer, or it cannot be made
      SubjectUnusable   checkpoint and data do not fit together
      PlotImpossible    nothing to draw with, or nothing to draw
"""

from __future__ import annotations


class EvaluationError(Exception):
    """Root of what stops an evaluation."""


class TaskInvalid(EvaluationError):
    """Similarities, positives and k do not fit together."""


class ScoresUnusable(EvaluationError):
    """A scorer gave something that cannot be ranked."""


class RecallChanged(EvaluationError):
    """R@k differs before and after reranking: one of the two rankings is wrong."""


class StorageImpossible(EvaluationError):
    """The tokens cannot be held in the storage type asked for."""


class ScorerUnknown(EvaluationError):
    """There is no such scorer, or it cannot be made."""


class SubjectUnusable(EvaluationError):
    """Checkpoint and data do not fit together."""


class PlotImpossible(EvaluationError):
    """Nothing to draw with, or nothing to draw."""
