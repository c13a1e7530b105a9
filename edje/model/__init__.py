"""The network: adapter, joint encoder, late fusion, matching head, and the model they make. Imports torch."""
