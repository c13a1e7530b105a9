"""The batches of a phase: captions and images as arrays, negatives, grounding labels, cached text states."""
