"""What a scorer computes, in GFLOP, and what a cascade of two does.

Two operations to a multiply-add. What is spent offline, once per image, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from edje.model.flops import Cost


@dataclass(frozen=True, slots=True)
class ScorerCost:
    """Spent once for a query, and again for each of its pairs."""

    gflop_per_query: float
    gflop_per_pair: float

    def per_pair_at(self, k: int) -> float:
        """A pair's share of everything, where a query has k candidates: what scorers are compared by."""
        return self.gflop_per_pair + self.gflop_per_query / k


def scorer_cost(cost: Cost) -> ScorerCost:
    """From the operations that `edje.model.flops` counts."""
    return ScorerCost(cost.per_query / 1e9, cost.per_pair / 1e9)


def cascade_cost(cheap: ScorerCost, full: ScorerCost, budget: int, k: int, *, shared_query: bool = False) -> ScorerCost:
    """Both stages as one, where a query has k candidates and the `budget` best of them reach the full scorer.

    `shared_query` says that both read the same query states, so that the dearer of the two is spent once.
    """
    per_query = [cheap.gflop_per_query] + ([full.gflop_per_query] if budget else [])
    share = min(budget, k) / k
    return ScorerCost(
        max(per_query) if shared_query else sum(per_query), cheap.gflop_per_pair + share * full.gflop_per_pair
    )
