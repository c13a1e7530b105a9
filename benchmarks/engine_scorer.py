"""The service's engine as a scorer of `python -m edje.evaluate`, so that an evaluation measures the served scores.

Run: python -m edje.evaluate CHECKPOINT --data RECIPE --storage int8 --scorer benchmarks.engine_scorer:torch_engine

Decodes stored blobs into the engine's slab and scores pairs by its contract, as the rerank worker does. Another
runtime needs a function like `torch_engine`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edje.checkpoint import read_config
from edje.evaluation.encoded_split import EncodedSplit
from edje.text import Tokenizer
from protocols.blob import BlobLayout, decode_blobs
from trt.contract import PairScorer
from trt.load import Runtime, load_engine

MAX_PAIRS = 256
#: Blobs decoded at a time: the size of a staging buffer.
_STAGED = 1024

Scorer = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


def torch_engine(split: EncodedSplit) -> Scorer:
    """Return a scorer that uses the torch runtime on a CPU."""
    return engine_scorer(split, "torch", "cpu")


def engine_scorer(split: EncodedSplit, runtime: Runtime, device: str) -> Scorer:
    """Load the checkpoint into an engine with a slot for every image, and score through it."""
    if not split.stored.blobs:
        raise SystemExit("an engine reads stored blobs: give --storage fp16, bf16, int8 or int4")
    engine = load_engine(
        runtime,
        split.checkpoint,
        storage=split.stored.storage,
        num_slots=len(split.image_ids),
        max_pairs=MAX_PAIRS,
        max_images=1,
        num_threads=None,
        device=device,
    )
    _fill(engine, split)
    tokenizer = Tokenizer.load(split.checkpoint)

    def score(captions: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.empty(len(captions), np.float32)
        for start in range(0, len(captions), MAX_PAIRS):
            part = slice(start, start + MAX_PAIRS)
            names, numbers = np.unique(captions[part], return_inverse=True)
            queries = engine.encode_queries([tokenizer.encode(split.captions[name]) for name in names])
            logits[part] = engine.score_pairs(queries, numbers.astype(np.int32), images[part].astype(np.int32))
        return logits

    return score


def _fill(engine: PairScorer, split: EncodedSplit) -> None:
    config = read_config(split.checkpoint)
    layout = BlobLayout(split.model_digest, config.adapter.num_tokens, config.joint.dim, split.stored.storage)
    for start in range(0, len(split.stored.blobs), _STAGED):
        blobs = split.stored.blobs[start : start + _STAGED]
        slots = range(start, start + len(blobs))
        tokens, scales, rows = engine.slab.stage(slots)
        for error in decode_blobs(layout, blobs, tokens, scales, rows):
            if error is not None:
                raise error
        engine.slab.publish(slots, rows)
