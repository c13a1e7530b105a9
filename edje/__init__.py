"""The model: preprocessing, vision tower, adapter, joint encoder, checkpoints. Knows nothing of the service."""
