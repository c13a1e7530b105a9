"""The lengths that texts are padded to: one table for the worker's micro-batches, CUDA graphs and TensorRT profiles.

Knows numbers only.
"""

from __future__ import annotations

#: Texts are padded to a multiple of this many tokens: less than 5 % of 18 text and 64 visual tokens on average.
LENGTH_STEP = 8
#: Padded lengths of the texts that models accept; longer ones continue in the same steps.
TEXT_LENGTHS = tuple(range(LENGTH_STEP, 64 + 1, LENGTH_STEP))


def padded_length(num_text_tokens: int) -> int:
    """The multiple of `LENGTH_STEP` that a text of this many tokens is padded to."""
    return -(-num_text_tokens // LENGTH_STEP) * LENGTH_STEP


def lengths_up_to(max_text_tokens: int, lengths: tuple[int, ...] = TEXT_LENGTHS) -> tuple[int, ...]:
    """The padded lengths of a model, ascending; the last one is its longest text, which no text needs to exceed."""
    return (*(length for length in sorted(set(lengths)) if length < max_text_tokens), max_text_tokens)
