"""Spans and metrics of a worker: names, creation and export."""
