"""Saves and loads a model as a checkpoint folder; `edje.checkpoint` reads the parts that need no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from edje.checkpoint import (
    CONFIG_FILE,
    FORMAT_VERSION,
    GRAPH_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointMismatch,
    Envelope,
    digest_of,
    read_config,
    read_digest,
    read_graph,
)
from edje.config import EdjeConfig
from edje.files import draft_directory
from edje.model.edje import Edje, build_edje
from edje.optional import PackageMissing
from edje.towers.base import TowerError, onnx_graph


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model on the CPU in evaluation mode, its configuration and its digest."""

    config: EdjeConfig
    model: Edje
    digest: str


def save_checkpoint(checkpoint: Path, config: EdjeConfig, model: Edje, tokenizer_json: str) -> str:
    """Write a new checkpoint folder atomically and return its digest.

    Raises `CheckpointExists` unless the folder is new or empty.
    """
    if checkpoint.exists() and (not checkpoint.is_dir() or any(checkpoint.iterdir())):
        raise CheckpointExists(f"{checkpoint} exists: remove it or choose another folder")
    with draft_directory(checkpoint) as draft:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
            draft / WEIGHTS_FILE,
        )
        (draft / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        graph = onnx_graph(model.vision)
        if graph is not None:
            (draft / GRAPH_FILE).write_bytes(graph)
        digest = digest_of(draft, config)
        envelope = Envelope(format_version=FORMAT_VERSION, model_digest=digest, config=asdict(config))
        (draft / CONFIG_FILE).write_text(envelope.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return digest


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """Verify the digest of a checkpoint folder and load the model. Raises `CheckpointError`."""
    config = read_config(checkpoint)
    digest = read_digest(checkpoint)
    try:
        tensors = safetensors.torch.load_file(checkpoint / WEIGHTS_FILE)
    except SafetensorError as error:
        raise CheckpointIncomplete(f"{checkpoint / WEIGHTS_FILE} cannot be read: {error}") from error
    try:
        model = build_edje(config, device="meta", graph=read_graph(checkpoint, config))
    except (TowerError, PackageMissing) as error:
        raise CheckpointMismatch(f"{checkpoint} cannot be loaded here: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointMismatch(
            f"{checkpoint} holds weights of another architecture than its configuration {config.name!r}: "
            f"{name} is {found.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
        )
    model.load_state_dict(tensors, assign=True)
    return Checkpoint(config, model.eval().requires_grad_(False), digest)
