"""Chooses the fastest of several engines by a short trial. Knows only the engines' contract."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

from trt.contract import Engine

log = logging.getLogger(__name__)

#: Total duration of all trials in seconds.
TRIAL_S = 0.5
#: Another engine replaces the first one only if it takes less than this share of its time: noise must not decide.
MIN_GAIN = 0.9
_TRIAL_PAIRS, _TRIAL_TOKENS = 32, 18


def fastest_engine(engines: Mapping[str, Engine], clock: Callable[[], float]) -> str:
    """Return the name of the engine to use: the first one, or one that is clearly faster in a trial; log the choice."""
    names = list(engines)
    if len(names) == 1:
        return names[0]
    times = {name: _trial(engine, TRIAL_S / len(names), clock) for name, engine in engines.items()}
    fastest = min(names, key=lambda name: times[name])
    chosen = fastest if times[fastest] < MIN_GAIN * times[names[0]] else names[0]
    found = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in times.items())
    log.info("engine auto: %s is used (trial: %s)", chosen, found)
    return chosen


def _trial(engine: Engine, limit_s: float, clock: Callable[[], float]) -> float:
    """Return the seconds of the fastest call within the limit, without the first call. Scores empty slots."""
    info = engine.info
    num_pairs = min(_TRIAL_PAIRS, info.max_pairs, info.num_slots)
    pixels = np.zeros((1, 3, info.image_size, info.image_size), np.uint8)
    slots, text = np.arange(num_pairs, dtype=np.int32), [0] * min(_TRIAL_TOKENS, info.max_text_tokens)

    def call() -> None:
        if num_pairs > 1:
            engine.score_pairs(engine.encode_queries([text]), np.zeros_like(slots), slots)
        else:
            engine.encode_images(pixels)

    call()
    started_at, fastest_s = clock(), float("inf")
    while True:
        called_at = clock()
        call()
        ended_at = clock()
        fastest_s = min(fastest_s, ended_at - called_at)
        if ended_at - started_at >= limit_s:
            return fastest_s
