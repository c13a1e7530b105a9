"""The ingest worker: images in, token blobs out. `python -m workers.ingest`."""
