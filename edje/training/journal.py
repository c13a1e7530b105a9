"""What a run says of itself: one JSON object a line in metrics.jsonl, the same for TensorBoard. Knows no tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from edje.optional import need


class Journal:
    """Appends; a run that is resumed at a step first takes back what was said of later ones."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if line["step"] < resume_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        writer = need("torch.utils.tensorboard", "train").SummaryWriter
        self._board = writer(str(folder / "tensorboard"), purge_step=resume_step)

    def say(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Record values of one step; steps count through all phases."""
        self._file.write(json.dumps({"step": step, "phase": phase, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{phase}/{name}", value, step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[dict[str, float]]:
    """The lines of an earlier run; a last line that a kill cut off does not count."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
