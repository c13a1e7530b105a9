"""Shows where the time of one request went, from a file of spans: `python -m workers.traces`."""
