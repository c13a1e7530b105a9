"""Training: recipes, losses, mined negatives, the loop and its resumable state. Knows nothing of the service."""
