"""Loads the weights of a BERT or MiniLM checkpoint into a joint encoder of any kind."""

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
    read_tokenizer,
)
from edje.imports.layouts import POOLER, format_shape, join_names

_LAYER = "layers."


@dataclass(frozen=True, slots=True)
class BertReport:
    """The joint encoder's tensors that were loaded from the source, and those that were left unchanged."""

    shape: BertShape
    loaded: tuple[str, ...]
    untouched: tuple[str, ...]


@torch.no_grad()
def load_bert(
    source: Path,
    joint: nn.Module,
    layers: Sequence[int] | None = None,
    visual_layers: Sequence[int] | None = None,
    *,
    vocabulary: Mapping[str, int] | None = None,
) -> BertReport:
    """Load the source's weights into a joint encoder; tensors without a counterpart in the source stay unchanged.

    Args:
        source: folder of the BERT checkpoint.
        joint: the joint encoder. Its text layers start from the source's first layers.
        layers: the source's layers for the fusion layers (for all layers of kind `full`); None for those after the text
            layers, or the last ones if too few follow. An empty sequence leaves the layers unchanged.
        visual_layers: the same for the visual layers; None for the source's first layers.
        vocabulary: the ids by token that the joint encoder reads; None if it is the source's vocabulary.

    Raises `BertError` if something does not fit; nothing is changed then.
    """
    if vocabulary is not None:
        _compare_vocabularies(source, read_tokenizer(source).get_vocab(), vocabulary)
    shape, targets = read_shape(source), joint.state_dict()
    num_text, num_visual, num_fusion = (_num_layers(targets, kind) for kind in ("text_", "visual_", ""))
    if layers is None:
        if num_fusion > shape.num_layers:
            raise BertError(f"{source} has {shape.num_layers} layers, the joint encoder has {num_fusion}")
        start = num_text if num_text + num_fusion <= shape.num_layers else shape.num_layers - num_fusion
        layers = range(start, start + num_fusion)
    visual_layers = range(num_visual) if visual_layers is None else visual_layers
    wanted = {"text_": (range(num_text), num_text), "visual_": (visual_layers, num_visual), "": (layers, num_fusion)}
    for kind, (numbers, num_wanted) in wanted.items():
        if numbers and len(numbers) != num_wanted:
            raise BertError(
                f"the joint encoder has {num_wanted} {kind}layers: give as many layers of {source}, not {list(numbers)}"
            )
    taken = {kind: layer_numbers(source, shape, numbers) for kind, (numbers, _) in wanted.items()}
    ours = dict(_renamed(bert_tensors(source), taken, targets, shape))
    wrong = [
        f"{name} is {format_shape(tensor.shape)} in the source and "
        f"{format_shape(targets[name].shape) if name in targets else 'absent'} in the joint encoder"
        for name, tensor in ours.items()
        if name not in targets or tensor.shape != targets[name].shape
    ]
    if wrong:
        raise BertError(f"{source} does not fit this joint encoder: {join_names(wrong)}")
    for name, tensor in ours.items():
        targets[name].copy_(tensor)
    return BertReport(shape, tuple(sorted(ours)), tuple(sorted(targets.keys() - ours.keys())))


def _renamed(
    source: Mapping[str, Tensor],
    taken: Mapping[str, Sequence[int]],
    targets: Mapping[str, Tensor],
    shape: BertShape,
) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors under the joint encoder's names."""
    # A joint encoder with more positions repeats the source's: good enough to start training from.
    rows = torch.arange(len(targets["positions.weight"])) % shape.max_positions
    for name, tensor in source.items():
        if name.startswith(_LAYER):
            number, within = name.removeprefix(_LAYER).split(".", 1)
            for kind, numbers in taken.items():
                for ours in (ours for ours, theirs in enumerate(numbers) if theirs == int(number)):
                    yield f"{kind}{_LAYER}{ours}.{within}", tensor
                    # The map of visual tokens to keys and values starts as the text's map.
                    visual = f"{kind}{_LAYER}{ours}.{within.replace('attention.qkv', 'visual_kv')}"
                    if visual in targets and "attention.qkv" in within:
                        yield visual, tensor[shape.dim :]
        elif name == "positions.weight":
            yield name, tensor[rows]
        elif not name.startswith(POOLER) or name in targets:  # maxsim has no pooler
            yield name, tensor
        if name.startswith("norm.") and f"visual_{name}" in targets:
            yield f"visual_{name}", tensor


def _compare_vocabularies(source: Path, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Raise `BertError` if a token has another id in the joint encoder than in the source."""
    differing = sorted(theirs.keys() | ours.keys(), key=lambda token: (theirs.get(token, -1), token))
    token = next((token for token in differing if theirs.get(token) != ours.get(token)), None)
    if token is not None:
        raise BertError(
            f"the vocabulary is not that of {source}: {token!r} is token {theirs.get(token, 'absent')} there and "
            f"{ours.get(token, 'absent')} in the vocabulary. Its word embeddings would belong to other words: leave "
            "the vocabulary out, or the BERT"
        )


def _num_layers(names: Mapping[str, Tensor], kind: str) -> int:
    """The number of a joint encoder's layers of a kind."""
    starts = f"{kind}{_LAYER}"
    return len({name.removeprefix(starts).split(".")[0] for name in names if name.startswith(starts)})
