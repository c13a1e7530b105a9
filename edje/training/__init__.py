"""Training: batches, losses, the loop over a phase's steps, and the resumable state. Knows nothing of the service."""
