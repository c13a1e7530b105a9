"""The gateway: rerank APIs, search, image upload and the search page over HTTP, in front of Kafka and the index."""
