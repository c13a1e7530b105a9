"""Reads a BERT or MiniLM checkpoint in Hugging Face's layout: its shape, its weights under our names, its tokenizer.

A source is a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and a tokenizer.
`edje.imports.sources` finds it, `edje.imports.bert` loads its weights into a joint encoder.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from edje.config import JointConfig
from edje.imports.layouts import (
    bert_embedding_rules,
    bert_layer_rules,
    join_names,
    missing_names,
    pooler_rules,
    shape_mismatches,
)
from edje.model.joint import JointEncoder
from edje.tower_config import Count
from edje.vocabulary import IMAGE_TOKEN, SPECIAL_TOKENS, VocabularyError, wordpiece_tokenizer
from protocols.validation import first_problem

CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE = "config.json", "model.safetensors", "pytorch_model.bin"
TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocab.txt"


class BertError(ValueError):
    """The source cannot be read, or does not fit the joint encoder; the message says why."""


@dataclass(frozen=True, slots=True)
class BertShape:
    """Sizes of a source. `vocab_size` includes the `<image>` token, which is added to a source without one."""

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    sep_id: int


class BertConfig(BaseModel):
    """The fields of `config.json` that our layers depend on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["bert"]
    hidden_act: Literal["gelu"]
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    vocab_size: Count
    max_position_embeddings: Count
    type_vocab_size: Literal[2]
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    position_embedding_type: Literal["absolute"] = "absolute"


def read_shape(source: Path) -> BertShape:
    """The shape of a source folder, from its configuration and its tokenizer. Raises `BertError`."""
    return _shape(read_bert_config(source / CONFIG_FILE), read_tokenizer(source))


def tokenizer_json(source: Path) -> str:
    """The source's tokenizer as JSON for a checkpoint: without padding and truncation, with `<image>`."""
    return str(read_tokenizer(source).to_str())


def bert_tensors(source: Path, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The source's weights in float32 under the names of a `JointEncoder`.

    `layers` are the source's layers to read, as indices of a list: `(-2, -1)` for the last two, which become layers 0
    and 1. None reads all. A row that is added for `<image>` is the mean of all word embeddings. Without a pooler in
    the source, the result has none.
    """
    config = read_bert_config(source / CONFIG_FILE)
    shape = _shape(config, read_tokenizer(source))
    taken = layer_numbers(source, shape, range(shape.num_layers) if layers is None else layers)
    theirs = _encoder_only(_read_tensors(source))
    rules = [*(rule.prefixed("", "embeddings.") for rule in bert_embedding_rules()), *bert_layer_rules(taken)]
    if any(name.startswith("pooler.") for name in theirs):
        rules += (rule.prefixed("", "pooler.") for rule in pooler_rules())
    missing = missing_names(theirs, rules)
    if missing:
        raise BertError(f"{source} is not a complete BERT of {shape.num_layers} layers, missing: {join_names(missing)}")
    expected = JointConfig(
        dim=shape.dim,
        num_layers=len(taken),
        num_heads=shape.num_heads,
        hidden_dim=shape.hidden_dim,
        vocab_size=config.vocab_size,
        sep_id=shape.sep_id,
        max_positions=shape.max_positions,
    )
    with torch.device("meta"):
        wrong = shape_mismatches(theirs, rules, JointEncoder(expected).state_dict())
    if wrong:
        raise BertError(f"the weights in {source} do not match its {CONFIG_FILE}: {join_names(wrong)}")
    ours = {rule.ours: rule.apply(theirs).float() for rule in rules}
    words = ours["words.weight"]
    added = words.mean(dim=0, keepdim=True).expand(shape.vocab_size - len(words), -1)
    ours["words.weight"] = torch.cat((words, added))
    return ours


def layer_numbers(source: Path, shape: BertShape, layers: Sequence[int]) -> list[int]:
    """Layer numbers from 0, with negative ones counted from the end. Raises `BertError` for a layer that is missing."""
    try:
        return [range(shape.num_layers)[number] for number in layers]
    except IndexError as error:
        raise BertError(
            f"{source} has {shape.num_layers} layers, not all of {list(layers)}: name other layers"
        ) from error


def read_bert_config(path: Path) -> BertConfig:
    """Read a BERT's `config.json`. Raises `BertError`."""
    try:
        return BertConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BertError(f"{path} cannot be read ({error.strerror}): give a folder in Hugging Face's layout") from error
    except ValidationError as error:
        problem = first_problem(error, root="the file")
        raise BertError(f"{path} does not describe a BERT that the joint encoder can use: {problem}") from error


def read_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a folder, a `tokenizer.json` or a `vocab.txt`, with `<image>` added. Raises `BertError`."""
    path = source
    if source.is_dir():
        path = source / (TOKENIZER_FILE if (source / TOKENIZER_FILE).is_file() else VOCABULARY_FILE)
    if path.suffix != ".json":
        try:
            return wordpiece_tokenizer(path)
        except VocabularyError as error:
            raise BertError(str(error)) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise BertError(f"{path} cannot be read as a tokenizer: {error}") from error
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise BertError(f"{path} is not a BERT tokenizer: the tokens {', '.join(missing)} are missing")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    return tokenizer


def load_pickled(path: Path) -> object:
    """Load a file of `torch.save` that holds only tensors and plain values. Raises `ValueError`; runs no code."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of unusual files before it fails
            # Files from before 2020 are not zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of torch.save, or holds objects other than tensors, which could run code: "
            "download or copy it again, or save the state dictionary alone"
        ) from error
    except Exception as error:  # its parser raises errors of many classes
        raise ValueError(f"{path} is not a complete file of torch.save: download or copy it again") from error


def _shape(config: BertConfig, tokenizer: Tokenizer) -> BertShape:
    sep_id = tokenizer.token_to_id("[SEP]")
    assert sep_id is not None  # `read_tokenizer` requires it
    return BertShape(
        dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_dim=config.intermediate_size,
        vocab_size=max(config.vocab_size, tokenizer.get_vocab_size()),
        max_positions=config.max_position_embeddings,
        norm_eps=config.layer_norm_eps,
        sep_id=sep_id,
    )


def _read_tensors(source: Path) -> dict[str, Tensor]:
    path = source / SAFETENSORS_FILE
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        path = source / PICKLE_FILE
        loaded = load_pickled(path)
    except SafetensorError as error:
        raise BertError(f"{path} is not a complete safetensors file ({error}): download or copy it again") from error
    except ValueError as error:
        raise BertError(str(error)) from error
    if not isinstance(loaded, dict) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise BertError(f"{path} holds objects other than named tensors: give the folder of a BERT")
    return loaded


def _encoder_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors, without the prefix `bert.` that a model with a head gives them."""
    if any(name.startswith("bert.") for name in tensors):
        return {name.removeprefix("bert."): each for name, each in tensors.items() if name.startswith("bert.")}
    return dict(tensors)
