"""The operations of a scorer, in GFLOP, and those of a cascade of two.

A multiply-add counts as two operations. Work that is done offline, once per image, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from edje.model.flops import Cost


@dataclass(frozen=True, slots=True)
class ScorerCost:
    """Operations per query, and per pair in addition."""

    gflop_per_query: float
    gflop_per_pair: float

    def per_pair_at(self, k: int) -> float:
        """All operations per pair where a query has k candidates; the figure by which scorers are compared."""
        return self.gflop_per_pair + self.gflop_per_query / k


def scorer_cost(cost: Cost) -> ScorerCost:
    """The cost in GFLOP, from the operations that `edje.model.flops` counts."""
    return ScorerCost(cost.per_query / 1e9, cost.per_pair / 1e9)


def cascade_cost(cheap: ScorerCost, full: ScorerCost, budget: int, k: int, *, shared_query: bool = False) -> ScorerCost:
    """The cost of a cascade where a query has k candidates and the `budget` best of them reach the full scorer.

    With `shared_query` both stages read the same query states, so only the more expensive of the two is counted.
    """
    per_query = [cheap.gflop_per_query] + ([full.gflop_per_query] if budget else [])
    share = min(budget, k) / k
    return ScorerCost(
        max(per_query) if shared_query else sum(per_query), cheap.gflop_per_pair + share * full.gflop_per_pair
    )
