"""The first stage in training: candidate pairs, their scores, and cached embeddings."""
