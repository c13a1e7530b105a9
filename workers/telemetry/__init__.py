"""Spans and metrics of a worker: their names, how spans are made, and their export."""
