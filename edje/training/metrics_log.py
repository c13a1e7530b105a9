"""Writes the metrics of a run: one JSON object per line in metrics.jsonl, and TensorBoard's files. Knows no tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from edje.files import write_file
from edje.optional import require_package


class MetricsLog:
    """Appends lines. A resumed run first removes the lines that were written after its state was saved."""

    def __init__(self, folder: Path, *, resume_step: int, num_lines: int) -> None:
        """`num_lines` had been written when the state was saved, after `resume_step` steps."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)[:num_lines] if path.exists() else []
        write_file(path, b"".join(kept))
        self.num_lines = len(kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        writer = require_package("torch.utils.tensorboard", "train").SummaryWriter
        self._board = writer(str(folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Append the values of one step; steps are counted over all phases."""
        self._file.write(json.dumps({"step": step, "phase": phase, **values}) + "\n")
        self.num_lines += 1
        for name, value in values.items():
            self._board.add_scalar(f"{phase}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()
