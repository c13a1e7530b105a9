"""The index: image vectors and metadata in Postgres, written by the index worker and searched by the gateway."""
