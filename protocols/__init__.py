"""The wire contract: events, encodings, topics and the token blob.

Holds everything that another team's code may rely on. Knows no broker, no store and no model.
"""
