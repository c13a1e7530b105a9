"""Starts a joint encoder of any kind from a BERT or MiniLM checkpoint, which `edje.imports.bert_checkpoint` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edje.imports.bert_checkpoint import (
    BertError,
    BertShape,
    bert_tensors,
    layer_numbers,
    read_shape,
    tokenizer_json,
)
from edje.imports.layouts import POOLER, listed, size

__all__ = ["BertError", "BertReport", "BertShape", "bert_tensors", "load_bert", "read_shape", "tokenizer_json"]

_LAYER = "layers."


@dataclass(frozen=True, slots=True)
class BertReport:
    """What happened to the joint encoder's tensors: those taken from the source, and those left as they were."""

    shape: BertShape
    loaded: tuple[str, ...]
    untouched: tuple[str, ...]


@torch.no_grad()
def load_bert(
    source: Path,
    joint: nn.Module,
    layers: Sequence[int] | None = None,
    visual_layers: Sequence[int] | None = None,
) -> BertReport:
    """Give a joint encoder the source's weights; what the source lacks stays as it is.

    `layers` are those of the source that become the ones in which text and image meet, `visual_layers` those that
    become the ones that read images alone; text layers are the source's first ones. Where nothing is said, the layers
    of the meeting go on where the text layers end, or are the source's last ones where too few are left, and the visual
    ones are its first ones. An empty sequence leaves those layers as they are.
    Raises `BertError` where something does not fit; nothing is changed then.
    """
    shape, targets = read_shape(source), joint.state_dict()
    num_text, num_visual, num_meeting = (_num_layers(targets, kind) for kind in ("text_", "visual_", ""))
    if layers is None:
        if num_meeting > shape.num_layers:
            raise BertError(f"{source} has {shape.num_layers} layers, the joint encoder wants {num_meeting}")
        start = num_text if num_text + num_meeting <= shape.num_layers else shape.num_layers - num_meeting
        layers = range(start, start + num_meeting)
    visual_layers = range(num_visual) if visual_layers is None else visual_layers
    wanted = {"text_": (range(num_text), num_text), "visual_": (visual_layers, num_visual), "": (layers, num_meeting)}
    for kind, (numbers, num_wanted) in wanted.items():
        if numbers and len(numbers) != num_wanted:
            raise BertError(f"{num_wanted} {kind}layers cannot start from the {len(numbers)} layers {list(numbers)}")
    taken = {kind: layer_numbers(source, shape, numbers) for kind, (numbers, _) in wanted.items()}
    ours = dict(_renamed(bert_tensors(source), taken, targets, shape))
    wrong = [
        f"{name} is {size(tensor.shape)} there and {size(targets[name].shape) if name in targets else 'absent'} here"
        for name, tensor in ours.items()
        if name not in targets or tensor.shape != targets[name].shape
    ]
    if wrong:
        raise BertError(f"{source} does not fit this joint encoder: {listed(wrong)}")
    for name, tensor in ours.items():
        targets[name].copy_(tensor)
    return BertReport(shape, tuple(sorted(ours)), tuple(sorted(targets.keys() - ours.keys())))


def _renamed(
    source: Mapping[str, Tensor],
    taken: Mapping[str, Sequence[int]],
    targets: Mapping[str, Tensor],
    shape: BertShape,
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors under the names of this joint encoder."""
    # One that has more positions repeats them from the start: a place to begin training from, and no more than that.
    rows = torch.arange(len(targets["positions.weight"])) % shape.max_positions
    for name, tensor in source.items():
        if name.startswith(_LAYER):
            number, within = name.removeprefix(_LAYER).split(".", 1)
            for kind, numbers in taken.items():
                for ours in (ours for ours, theirs in enumerate(numbers) if theirs == int(number)):
                    yield f"{kind}{_LAYER}{ours}.{within}", tensor
                    # A map of its own for visual states begins as the text's map to keys and values.
                    visual = f"{kind}{_LAYER}{ours}.{within.replace('attention.qkv', 'visual_kv')}"
                    if visual in targets and "attention.qkv" in within:
                        yield visual, tensor[shape.dim :]
        elif name == "positions.weight":
            yield name, tensor[rows]
        elif not name.startswith(POOLER) or name in targets:  # an encoder without layers to meet in has no pooler
            yield name, tensor
        if name.startswith("norm.") and f"visual_{name}" in targets:
            yield f"visual_{name}", tensor


def _num_layers(names: Mapping[str, Tensor], kind: str) -> int:
    """How many layers of a kind a joint encoder has."""
    starts = f"{kind}{_LAYER}"
    return len({name.removeprefix(starts).split(".")[0] for name in names if name.startswith(starts)})
