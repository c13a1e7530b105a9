"""The rerank worker: requests in, rankings out. `python -m workers.rerank`."""
