"""How many seconds of work wait for this worker: what an autoscaler adds up over all workers.

Pure. Work is counted in tokens, because a request of 1,000 candidates is not one of 10; a message that is still in
Kafka counts as much as the requests seen lately did on average. The rate is that of the engine while it was busy: idle
time says nothing about what it could do. Where the engine is not what holds a worker back (a slow store), the figure is
too low.
"""

from __future__ import annotations

#: What was seen so long ago counts half: in requests for their size, in busy seconds for the rate.
HALF_LIFE_REQUESTS = 256
HALF_LIFE_BUSY_S = 10.0


class Backlog:
    """Learns the size of requests and the rate of the engine, and tells what waits in seconds."""

    def __init__(self) -> None:
        self._requests = self._request_tokens = 0.0
        self._busy_s = self._scored_tokens = 0.0

    def accepted(self, num_tokens: int) -> None:
        """A request of so many tokens has been taken."""
        kept = 0.5 ** (1 / HALF_LIFE_REQUESTS)
        self._requests = self._requests * kept + 1
        self._request_tokens = self._request_tokens * kept + num_tokens

    def scored(self, num_tokens: int, busy_s: float) -> None:
        """The engine has taken so long for a batch."""
        kept = 0.5 ** (busy_s / HALF_LIFE_BUSY_S)
        self._busy_s = self._busy_s * kept + busy_s
        self._scored_tokens = self._scored_tokens * kept + num_tokens

    def seconds(self, *, num_tokens: int, lag_events: int) -> float | None:
        """The work of these tokens and of so many messages.

        Nothing is no work, whatever the rate. Before the first batch has been scored there is no rate, and before the
        first request no size: then None, because any number would be made up. A sum over workers leaves it out, and a
        worker that has work scores its first batch soon.
        """
        if num_tokens == 0 and lag_events == 0:
            return 0.0
        if self._busy_s == 0 or self._requests == 0:
            return None
        waiting = num_tokens + lag_events * self._request_tokens / self._requests
        return waiting * self._busy_s / self._scored_tokens
