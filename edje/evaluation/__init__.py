"""How well a model ranks: the published protocol, over any scorer, with intervals.

`protocol`, `metrics`, `bootstrap`, `cascade` and `storage` are numpy alone; `subject` is where a checkpoint and its
data come in.
"""
