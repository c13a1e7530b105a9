"""Kafka behind the ports of `workers.ports`: the only package that imports kafka-python, and the in-memory twin."""
