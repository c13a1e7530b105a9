"""Decides when a container's probes are due, and whether it is started, ready or to be restarted.

Pure: time is an argument and the caller runs the probes. The rules are the kubelet's: only the startup probe runs
until it has succeeded; then readiness and liveness, each with its own period and thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ProbeKind = Literal["startup", "readiness", "liveness"]
KINDS: tuple[ProbeKind, ...] = ("startup", "readiness", "liveness")
#: What counts before enough answers are in: alive, not ready, not known to have started or to have failed to.
BEFORE: dict[ProbeKind, bool | None] = {"startup": None, "readiness": False, "liveness": True}


@dataclass(slots=True)
class _Probe:
    spec: Mapping[str, Any]
    result: bool | None
    due: float
    last: bool | None = None
    num_alike: int = 0

    def note(self, success: bool, now: float) -> None:
        self.due = now + self.spec["periodSeconds"]
        self.num_alike = self.num_alike + 1 if success == self.last else 1
        self.last = success
        if self.num_alike >= self.spec["successThreshold" if success else "failureThreshold"]:
            self.result = success


class ContainerHealth:
    """The results of the probes of one running container."""

    def __init__(self, container: Mapping[str, Any], now: float) -> None:
        """`container` is its part of a pod's spec as the API server completes it: no default is missing."""
        self._probes = {
            kind: _Probe(spec, BEFORE[kind], now + spec.get("initialDelaySeconds", 0))
            for kind in KINDS
            if (spec := container.get(f"{kind}Probe")) is not None
        }

    @property
    def is_started(self) -> bool:
        return self._result("startup") is True

    @property
    def is_ready(self) -> bool:
        return self.is_started and self._result("readiness") is True

    @property
    def must_restart(self) -> bool:
        return self._result("startup") is False or self._result("liveness") is False

    def due(self, now: float) -> list[ProbeKind]:
        """The probes to ask now; each is due again when its answer has been noted and its period is over."""
        wanted = KINDS[1:] if self.is_started else KINDS[:1]
        return [kind for kind in wanted if kind in self._probes and now >= self._probes[kind].due]

    def note(self, kind: ProbeKind, success: bool, now: float) -> None:
        """Take an answer; `now` is when it was asked."""
        self._probes[kind].note(success, now)

    def _result(self, kind: ProbeKind) -> bool | None:
        return self._probes[kind].result if kind in self._probes else True
