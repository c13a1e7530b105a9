"""Clients of other people's rerank APIs run in an environment of their own: `make test-clients`."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("cohere") else ["test_sdks.py"]
