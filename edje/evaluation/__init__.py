"""How well a model ranks: the published protocol, over any scorer, with confidence intervals.

`encoded_split` loads a checkpoint and a dataset, `torch_scorers` runs the model; the other modules are numpy alone.
"""
