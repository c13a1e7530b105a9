"""The wire contract: events, encodings, topics, keys and the token blob.

Everything another team's code may rely on, and nothing else; knows no broker, no store and no model.
"""
