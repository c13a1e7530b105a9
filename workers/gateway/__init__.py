"""The gateway: serves rerank APIs, search, image upload and the search page over HTTP, by Kafka and the index."""
