"""The token store: Redis behind `workers.ports.TokenStore`, and its in-memory twin."""
