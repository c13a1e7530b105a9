"""Comparison of engines: verification pairs, reports, and the layers of a plan."""
