"""The lengths to which texts are padded: one table for the worker's micro-batches, CUDA graphs and TensorRT profiles.

Knows numbers only.
"""

from __future__ import annotations

#: Texts are padded to a multiple of this number of tokens. For texts of 18 tokens the padding is below 5 % of the text
#: and visual tokens on average.
LENGTH_STEP = 8
#: Padded lengths of the texts that models accept; longer texts continue in the same steps.
TEXT_LENGTHS = tuple(range(LENGTH_STEP, 64 + 1, LENGTH_STEP))


def padded_length(num_text_tokens: int) -> int:
    """Return the multiple of `LENGTH_STEP` to which a text of this many tokens is padded."""
    return -(-num_text_tokens // LENGTH_STEP) * LENGTH_STEP


def lengths_up_to(max_text_tokens: int, lengths: tuple[int, ...] = TEXT_LENGTHS) -> tuple[int, ...]:
    """Return the padded lengths of a model, ascending; the last one is the length of its longest text."""
    return (*(length for length in sorted(set(lengths)) if length < max_text_tokens), max_text_tokens)
