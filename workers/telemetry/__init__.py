"""What a worker tells of its work: the names, the spans, where they go, and the metrics on their way to a collector."""
