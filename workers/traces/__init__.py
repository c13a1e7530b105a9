"""Shows the timings of one request from a file of spans: `python -m workers.traces`."""
