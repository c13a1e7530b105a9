"""The authors' weights: their tensor names, the configuration that their shapes imply, and the tensors we need.

Names and shapes only; `edje.convert` reads the file and writes a checkpoint.

Their model reads a caption and an image as a pair of texts. BERT's tokenizer encodes the caption together with one
`<image>` for each visual token. Only the caption is cut (`only_first`, 64 + m tokens in all, so 61 word pieces), and a
batch is padded on the right, after the last [SEP]. BERT counts positions from the first token and masks the padding, so
the visual tokens directly follow their caption, the last [SEP] follows them, and both have token type 1, as in
`edje.model.joint`. Each visual token replaces the word embedding of its `<image>`; `language_model.bert.embeddings`
then adds position and type and normalises. Word embeddings are read from `text_embeddings` where the file has it,
because the outer model embeds the pair and passes the result to `language_model`. Normally the two tables are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from edje.config import AdapterConfig, EdjeConfig, JointConfig, PreprocessConfig
from edje.imports.layouts import (
    OUTPUT,
    TensorRule,
    bert_embedding_rules,
    bert_layer_rules,
    format_shape,
    missing_names,
    pooler_rules,
    siglip_rules,
)
from edje.model.variants import VARIANTS
from edje.tower_config import VitConfig

_TOWER, _ADAPTER, _BERT, _HEAD = "vision_encoder.", "vision_projection.", "language_model.bert.", "classification_head."
#: First parts of the names in the authors' file.
AUTHORS_PREFIXES = {"vision_encoder", "vision_projection", "language_model", "text_embeddings", "classification_head"}
_LANGUAGE_WORDS = f"{_BERT}embeddings.word_embeddings.weight"
_OUTER_WORDS = ("text_embeddings.weight", "text_embeddings.word_embeddings.weight")
#: Prefixes that a wrapper of torch, or the dictionary around the weights, puts before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

#: Tensors that scoring does not need, and their description; the first matching pattern counts.
_NOT_NEEDED: Final = (
    (r".*\.(position_ids|token_type_ids)", "constant position and type ids"),
    (r"clip\..*", "the first stage"),
    (r"teacher\..*", "the teacher of the distillation"),
    (r"text_projection\..*", "the text recovery loss"),
    (r"language_model\.cls\..*", "the masked language model's head"),
    (r"language_model\.bert\.pooler\..*", "BERT's own pooler"),
    # `language_model` adds position and type embeddings; of this copy only the words are read.
    (r"text_embeddings\.(position_embeddings|token_type_embeddings|LayerNorm)\..*", "a copy of BERT's embeddings"),
    (re.escape(_LANGUAGE_WORDS), "a copy of the words in text_embeddings"),
    (r"text_embeddings\.(word_embeddings\.)?weight", "a copy of the words in the language model"),
)

_COMPRESSION = {
    "key": "key",
    "value": "value",
    "attention.attention.out_proj": "attention.out_proj",
    "norm": "layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "projection": "projection",
}
_LOCAL = {"fc1": "0", "fc2": "2"}

#: Number of heads by width: SigLIP B, L and So400m; MiniLM-H384, BERT base and large.
_TOWER_HEADS: Final = {768: 12, 1024: 16, 1152: 16}
_BERT_HEADS: Final = {384: 12, 768: 12, 1024: 16}


class AuthorsError(ValueError):
    """The file does not hold the authors' complete weights; the message names the tensors."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Settings that shapes do not imply. Numbers of heads that are None follow from the width, if it is a known one."""

    sep_id: int
    tower_heads: int | None = None
    joint_heads: int | None = None
    tower_eps: float = 1e-6
    joint_eps: float = 1e-12
    canonical_captions: bool = True


@dataclass(frozen=True, slots=True)
class AuthorsLayout:
    """The variant of the authors' layout that a file has, from its names."""

    tower: str
    tower_layers: int
    joint_layers: int
    adapter: Literal["compression", "local"]
    words: str

    def rules(self) -> tuple[TensorRule, ...]:
        """One rule for every tensor of our model."""
        return (
            *(rule.prefixed("vision.", self.tower) for rule in siglip_rules(self.tower_layers)),
            *(rule.prefixed("adapter.", _ADAPTER) for rule in _adapter_rules(self.adapter)),
            *(
                TensorRule("joint.words.weight", (self.words,))
                if rule.ours == "words.weight"
                else rule.prefixed("joint.", f"{_BERT}embeddings.")
                for rule in bert_embedding_rules()
            ),
            *(rule.prefixed("joint.", _BERT) for rule in bert_layer_rules(range(self.joint_layers))),
            *(rule.prefixed("joint.", f"{_HEAD}0.") for rule in pooler_rules()),
            *(TensorRule(f"joint.{OUTPUT}{kind}", (f"{_HEAD}1.{kind}",)) for kind in ("weight", "bias")),
        )


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """The names in the file by the names without the prefixes of wrappers, which are removed if all names have them."""
    inner = {name: name for name in names}
    while any(inner and all(name.startswith(wrapper) for name in inner) for wrapper in _WRAPPERS):
        inner = {name.partition(".")[2]: outer for name, outer in inner.items()}
    return inner


def layout_of(names: Sequence[str]) -> AuthorsLayout:
    """The variant closest to the names; `check_names` verifies it."""
    # transformers 5 has no inner name.
    inner = f"{_TOWER}vision_model."
    tower = inner if any(name.startswith(inner) for name in names) else _TOWER
    is_local = any(re.match(rf"{re.escape(_ADAPTER)}[02]\.", name) for name in names)
    return AuthorsLayout(
        tower=tower,
        tower_layers=_num_layers(names, f"{tower}encoder.layers."),
        joint_layers=_num_layers(names, f"{_BERT}encoder.layer."),
        adapter="local" if is_local else "compression",
        words=next((name for name in _OUTER_WORDS if name in names), _LANGUAGE_WORDS),
    )


def check_names(names: Sequence[str], rules: Sequence[TensorRule]) -> tuple[list[str], list[str], Counter[str]]:
    """Missing names, unexpected names, and the number of unneeded tensors by description.

    The language model's words count as missing even where `text_embeddings` is read: a complete file has both.
    """
    needed = {name for rule in rules for name in rule.theirs}
    unexpected, unneeded = [], Counter[str]()
    for name in sorted(set(names) - needed):
        description = next((text for pattern, text in _NOT_NEEDED if re.fullmatch(pattern, name)), None)
        if description is None:
            unexpected.append(name)
        else:
            unneeded[description] += 1
    missing = missing_names(names, rules)
    if _LANGUAGE_WORDS not in needed and _LANGUAGE_WORDS not in names:
        missing.append(_LANGUAGE_WORDS)
    return missing, unexpected, unneeded


def duplicate_word_tables(layout: AuthorsLayout) -> tuple[str, str] | None:
    """The names of the two tables of words, the one that is read first; None for a file with one."""
    return None if layout.words == _LANGUAGE_WORDS else (layout.words, _LANGUAGE_WORDS)


def config_of(layout: AuthorsLayout, shapes: Mapping[str, tuple[int, ...]], options: ImportOptions) -> EdjeConfig:
    """The configuration that shapes and options imply. All names must be present. Raises `AuthorsError`."""
    sizes = _Sizes(shapes)
    *_, patch_size = sizes.axes(f"{layout.tower}embeddings.patch_embedding.weight", 4)
    positions = f"{layout.tower}embeddings.position_embedding.weight"
    num_patches = sizes.axes(positions, 2)[0]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise AuthorsError(f"{positions} has {num_patches} rows, which is not a square number of patches")
    is_local = layout.adapter == "local"
    wide, narrow = ("0", "2") if is_local else ("mlp.fc1", "mlp.fc2")
    tower, joint = f"{layout.tower}encoder.layers.0.", f"{_BERT}encoder.layer.0."
    dim = sizes.width(*((f"{tower}{name}", 0) for name in ("layer_norm1.weight", "layer_norm2.weight", "mlp.fc2.bias")))
    joint_norms = ("attention.output.LayerNorm.weight", "output.LayerNorm.weight", "output.LayerNorm.bias")
    joint_dim = sizes.width(*((f"{joint}{name}", 0) for name in joint_norms))
    try:
        config = EdjeConfig(
            name=f"authors-{layout.adapter}",
            trained=True,
            preprocess=PreprocessConfig(image_size=side * patch_size, canonical_captions=options.canonical_captions),
            vision=VitConfig(
                patch_size=patch_size,
                dim=dim,
                num_layers=layout.tower_layers,
                num_heads=_heads("vision", dim, options.tower_heads, _TOWER_HEADS),
                hidden_dim=sizes.hidden(f"{tower}mlp.fc1", f"{tower}mlp.fc2"),
                norm_eps=options.tower_eps,
            ),
            adapter=AdapterConfig(
                kind=layout.adapter,
                num_tokens=num_patches if is_local else sizes.axes(f"{_ADAPTER}query", 3)[1],
                hidden_dim=sizes.hidden(f"{_ADAPTER}{wide}", f"{_ADAPTER}{narrow}"),
            ),
            joint=JointConfig(
                dim=joint_dim,
                num_layers=layout.joint_layers,
                num_heads=_heads("joint", joint_dim, options.joint_heads, _BERT_HEADS),
                hidden_dim=sizes.hidden(f"{joint}intermediate.dense", f"{joint}output.dense"),
                vocab_size=sizes.axes(layout.words, 2)[0],
                sep_id=options.sep_id,
                max_positions=sizes.axes(f"{_BERT}embeddings.position_embeddings.weight", 2)[0],
                norm_eps=options.joint_eps,
            ),
        )
    except AuthorsError:
        raise
    except ValueError as error:
        raise AuthorsError(f"these weights do not fit together: {error}") from error
    named = (variant for variant in VARIANTS.values() if replace(variant, name=config.name, trained=True) == config)
    return replace(config, name=next((variant.name for variant in named), config.name))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Derives sizes from shapes.

    Where several tensors imply a size the majority decides, so that the message names the tensor that differs.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def axes(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of a tensor that must have `count` axes."""
        shape = self.shapes[name]
        if len(shape) != count or 0 in shape:
            raise AuthorsError(f"{name} is {format_shape(shape)}, expected {count} axes")
        return shape

    def width(self, *sides: tuple[str, int]) -> int:
        """The most frequent size among these axes of tensors."""
        found = Counter(self.shapes[name][axis] for name, axis in sides if axis < len(self.shapes[name]))
        commonest = max(found, key=lambda each: found[each], default=0)
        if not commonest:
            raise AuthorsError(f"{sides[0][0]} is {format_shape(self.shapes[sides[0][0]])}, expected at least one axis")
        return commonest

    def hidden(self, first: str, second: str) -> int:
        """The width between two linear maps."""
        return self.width((f"{first}.weight", 0), (f"{first}.bias", 0), (f"{second}.weight", 1))


def _adapter_rules(kind: str) -> tuple[TensorRule, ...]:
    """Rules from their projection to our adapter."""
    linear = _LOCAL if kind == "local" else _COMPRESSION
    rules = [
        TensorRule(f"{ours}.{part}", (f"{theirs}.{part}",))
        for ours, theirs in linear.items()
        for part in ("weight", "bias")
    ]
    if kind == "compression":
        rules.append(TensorRule("query", ("query",)))
        rules += (
            TensorRule(f"attention.attention.in_proj_{part}", (f"attention.in_proj_{part}",))
            for part in ("weight", "bias")
        )
    return tuple(rules)


def _num_layers(names: Iterable[str], prefix: str) -> int:
    """The number of layers, at least one, so that a missing layer is reported by name."""
    numbers = (re.match(rf"{re.escape(prefix)}(\d{{1,2}})\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=1)


def _heads(part: str, dim: int, options: int | None, known: Mapping[int, int]) -> int:
    heads = options or known.get(dim)
    if heads is None:
        raise AuthorsError(
            f"the number of attention heads does not follow from a width of {dim}: give it with --{part}-heads"
        )
    return heads
