"""Training batches: sampling, grounding labels, cached text states, and the data of a phase."""
