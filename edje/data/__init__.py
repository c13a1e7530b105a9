"""Datasets: images with captions, read from files or drawn. Knows neither torch nor the model."""
