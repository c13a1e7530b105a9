"""The service: the loop, the rerank, ingest and index workers, the gateway, their adapters and tools."""
