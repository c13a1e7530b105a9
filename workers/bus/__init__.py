"""Kafka behind the ports of `workers.ports`: the only package that knows kafka-python, and its in-memory twin."""
