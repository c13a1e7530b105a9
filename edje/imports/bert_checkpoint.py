"""Reads a BERT or MiniLM checkpoint in Hugging Face's layout: its shape, its weights under our names, its tokenizer.

A source is a folder with `config.json`, `model.safetensors` or `pytorch_model.bin`, and a tokenizer; how one is found
is `edje.imports.sources`, what is done with its weights `edje.imports.bert`.
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
from edje.imports.layouts import bert_embedding_rules, bert_layer_rules, listed, misshapen, missing_from, pooler_rules
from edje.model.joint import JointEncoder
from edje.tower_config import Count
from edje.vocabulary import IMAGE_TOKEN, SPECIAL_TOKENS, VocabularyError, wordpiece_tokenizer
from protocols.validation import first_problem

CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE = "config.json", "model.safetensors", "pytorch_model.bin"
TOKENIZER_FILE, VOCABULARY_FILE = "tokenizer.json", "vocab.txt"


class BertError(ValueError):
    """The source cannot start a joint encoder; the message says why."""


@dataclass(frozen=True, slots=True)
class BertShape:
    """The numbers of a source. `vocab_size` counts the `<image>` token, whether the source has it or gets it here."""

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    sep_id: int


class BertConfig(BaseModel):
    """What of `config.json` decides whether the layers compute what ours do."""

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
    """The source's tokenizer as a checkpoint stores it: neither padding nor truncation, `<image>` appended."""
    return str(read_tokenizer(source).to_str())


def bert_tensors(source: Path, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The source's weights in float32 under `JointEncoder`'s names.

    `layers` are those to take, counted from 0 and from the end as in a list: `(-2, -1)` for the last two, which become
    layers 0 and 1. None takes all of them. Rows that the vocabulary gains here (`<image>`) are the mean of the others.
    The pooler is left out where the source has none.
    """
    config = read_bert_config(source / CONFIG_FILE)
    shape = _shape(config, read_tokenizer(source))
    taken = layer_numbers(source, shape, range(shape.num_layers) if layers is None else layers)
    theirs = _encoder_only(_read_tensors(source))
    rules = [*(rule.prefixed("", "embeddings.") for rule in bert_embedding_rules()), *bert_layer_rules(taken)]
    if any(name.startswith("pooler.") for name in theirs):
        rules += (rule.prefixed("", "pooler.") for rule in pooler_rules())
    missing = missing_from(theirs, rules)
    if missing:
        raise BertError(f"{source} is no whole BERT of {shape.num_layers} layers: it lacks {listed(missing)}")
    plan = JointConfig(
        dim=shape.dim,
        num_layers=len(taken),
        num_heads=shape.num_heads,
        hidden_dim=shape.hidden_dim,
        vocab_size=config.vocab_size,
        sep_id=shape.sep_id,
        max_positions=shape.max_positions,
    )
    with torch.device("meta"):
        wrong = misshapen(theirs, rules, JointEncoder(plan).state_dict())
    if wrong:
        raise BertError(f"the weights in {source} are not those that its {CONFIG_FILE} describes: {listed(wrong)}")
    ours = {rule.ours: rule.apply(theirs).float() for rule in rules}
    words = ours["words.weight"]
    gained = words.mean(dim=0, keepdim=True).expand(shape.vocab_size - len(words), -1)
    ours["words.weight"] = torch.cat((words, gained))
    return ours


def layer_numbers(source: Path, shape: BertShape, layers: Sequence[int]) -> list[int]:
    """Layers counted from 0; below zero they count from the end. Raises `BertError` for those that do not exist."""
    try:
        return [range(shape.num_layers)[number] for number in layers]
    except IndexError as error:
        raise BertError(f"{source} has {shape.num_layers} layers: {list(layers)} asks for others") from error


def read_bert_config(path: Path) -> BertConfig:
    """A `config.json` that describes a BERT. Raises `BertError`."""
    try:
        return BertConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BertError(f"{path} cannot be read ({error.strerror}): give a folder in Hugging Face's layout") from error
    except ValidationError as error:
        problem = first_problem(error, root="the file")
        raise BertError(f"{path} describes no BERT that the joint encoder can use: {problem}") from error


def read_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a folder, or of a `tokenizer.json` or a `vocab.txt` alone. Raises `BertError`."""
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
    except Exception as error:  # the library raises nothing narrower
        raise BertError(f"{path} cannot be read as a tokenizer: {error}") from error
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise BertError(f"{path} is no BERT tokenizer: it lacks {', '.join(missing)}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    return tokenizer


def load_pickled(path: Path) -> object:
    """What `torch.save` wrote, as far as it is tensors and plain values. Raises `ValueError`; runs no code."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual files it warns, then fails
            # Files of before 2020 are no zip archives, and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors (a program could hide there): "
            "download or copy it again, or save the state dictionary alone"
        ) from error
    except Exception as error:  # its parser lets out whatever it trips over
        raise ValueError(f"{path} is not a whole file of torch.save: download or copy it again") from error


def _shape(config: BertConfig, tokenizer: Tokenizer) -> BertShape:
    sep_id = tokenizer.token_to_id("[SEP]")
    assert sep_id is not None  # no tokenizer is read without it
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
        raise BertError(f"{path} is not a whole safetensors file: {error}") from error
    except ValueError as error:
        raise BertError(str(error)) from error
    if not isinstance(loaded, dict) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise BertError(f"{path} holds something else than named tensors")
    return loaded


def _encoder_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors; a model with a head of its own keeps them below `bert.`."""
    if any(name.startswith("bert.") for name in tensors):
        return {name.removeprefix("bert."): each for name, each in tensors.items() if name.startswith("bert.")}
    return dict(tensors)
