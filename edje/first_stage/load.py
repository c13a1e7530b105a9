"""Loads the first-stage encoder of a checkpoint, of any kind."""

from __future__ import annotations

from pathlib import Path

from edje.checkpoint import CheckpointMissing
from edje.first_stage.base import CONFIG_FILE, FOLDER, FirstStageEncoder, read_folder
from edje.first_stage.dual_encoder import load_dual_encoder
from edje.first_stage.hub import load_hub_first_stage


def load_first_stage(checkpoint: Path) -> FirstStageEncoder:
    """The first-stage encoder of a checkpoint, on the CPU. Raises `CheckpointError`."""
    folder = checkpoint / FOLDER
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointMissing(f"{checkpoint} has no first stage: training writes one into the folder {FOLDER!r}")
    fields, data = read_folder(folder)
    load = load_hub_first_stage if fields.get("kind", "own") == "hub" else load_dual_encoder
    return load(folder, fields, data)
