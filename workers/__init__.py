"""The service: the loop, batching, ranking, the slot cache, adapters, and the two workers."""
