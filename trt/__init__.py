"""Engines: one contract for encoding images and scoring pairs, and the runtimes behind it."""
