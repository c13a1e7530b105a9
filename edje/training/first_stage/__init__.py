"""The first stage's part in training: embeddings of a split, its hard negatives, and statistics of its scores."""
