"""Errors of an evaluation; each message is a sentence for the person who runs it.

EvaluationError
  TaskInvalid        similarities, positives and k do not fit together
  ScoresUnusable     a scorer's output cannot be ranked
  RecallChanged      R@k differs before and after reranking, which no permutation of k candidates can do
  StorageImpossible  the storage type cannot hold the tokens
  ScorerUnknown      the scorer does not exist or cannot be made
  SplitUnusable      checkpoint and data do not fit together
  PlotImpossible     matplotlib is missing, or there is nothing to draw
  ServiceFailed      the running service did not rank the lists
"""

from __future__ import annotations


class EvaluationError(Exception):
    """Root of the errors that stop an evaluation."""


class TaskInvalid(EvaluationError):
    """Similarities, positives and k do not fit together."""


class ScoresUnusable(EvaluationError):
    """A scorer's output cannot be ranked."""


class RecallChanged(EvaluationError):
    """R@k differs before and after reranking: one of the two rankings is wrong."""


class StorageImpossible(EvaluationError):
    """The storage type cannot hold the tokens."""


class ScorerUnknown(EvaluationError):
    """The scorer does not exist or cannot be made."""


class SplitUnusable(EvaluationError):
    """Checkpoint and data do not fit together."""


class ServiceFailed(EvaluationError):
    """The running service did not rank the lists."""


class PlotImpossible(EvaluationError):
    """Matplotlib is missing, or there is nothing to draw."""
