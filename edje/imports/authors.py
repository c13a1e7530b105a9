"""The authors' weights: what their tensors are called, what shape of model they make, and which of them we need.

Names and shapes only; reading the file and writing a checkpoint is `edje.convert`.

Their model reads a caption and an image as a pair of texts: the caption and `<image>` once for each visual token go
through BERT's tokenizer together, the caption alone is cut (`only_first`, 64 + m tokens in all, so 61 word pieces
remain), and a batch is padded on the right, behind the last [SEP]. BERT counts positions from the sequence's first
token and does not look at the padding. So the visual tokens stand right behind their own caption, whatever else is in
the batch, the last [SEP] follows them, and both have token type 1, as `edje.model.joint` computes. Instead of
the embedding of `<image>` each visual token stands in the *word's* place; `language_model.bert.embeddings` then adds
position and type and normalises. Words are looked up in `text_embeddings` where the file has it: the outer model
embeds the pair itself, and `language_model` is only handed the result. In a sane file the two tables are one.
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
    LOGIT,
    Rule,
    bert_embedding_rules,
    bert_layer_rules,
    missing_from,
    pooler_rules,
    siglip_rules,
    size,
)
from edje.model.variants import VARIANTS
from edje.tower_config import VitConfig

_TOWER, _ADAPTER, _BERT, _HEAD = "vision_encoder.", "vision_projection.", "language_model.bert.", "classification_head."
_LANGUAGE_WORDS = f"{_BERT}embeddings.word_embeddings.weight"
_OUTER_WORDS = ("text_embeddings.weight", "text_embeddings.word_embeddings.weight")
#: What wrappers of torch put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

#: Theirs that scoring a pair does not need, and what they are; the first pattern that matches counts.
_NOT_NEEDED: Final = (
    (r".*\.(position_ids|token_type_ids)", "counters, no weights"),
    (r"clip\..*", "the first stage"),
    (r"teacher\..*", "the teacher of the distillation"),
    (r"text_projection\..*", "the text recovery loss"),
    (r"language_model\.cls\..*", "the masked language model's head"),
    (r"language_model\.bert\.pooler\..*", "BERT's own pooler"),
    # The language model embeds once more what it is handed; of this copy only the words are read.
    (r"text_embeddings\.(position_embeddings|token_type_embeddings|LayerNorm)\..*", "a copy of BERT's embeddings"),
    (re.escape(_LANGUAGE_WORDS), "words that text_embeddings has as well"),
    (r"text_embeddings\.(word_embeddings\.)?weight", "words that the language model has as well"),
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

#: Widths whose number of heads is settled: SigLIP B, L and So400m; MiniLM-H384, BERT base and large.
TOWER_HEADS: Final = {768: 12, 1024: 16, 1152: 16}
BERT_HEADS: Final = {384: 12, 768: 12, 1024: 16}


class AuthorsError(ValueError):
    """These are not the authors' weights, or not whole; the message says what is wrong by name."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What shapes cannot tell. Where the heads are None, the width decides, if it is a known one."""

    sep_id: int
    tower_heads: int | None = None
    joint_heads: int | None = None
    tower_eps: float = 1e-6
    joint_eps: float = 1e-12
    canonical_captions: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """Which of the layouts a file is in, as its names alone tell."""

    tower: str
    tower_layers: int
    joint_layers: int
    adapter: Literal["compression", "local"]
    words: str

    def rules(self) -> tuple[Rule, ...]:
        """Every tensor of our model, and where it is in theirs."""
        return (
            *(rule.prefixed("vision.", self.tower) for rule in siglip_rules(self.tower_layers)),
            *(rule.prefixed("adapter.", _ADAPTER) for rule in _adapter_rules(self.adapter)),
            *(
                Rule("joint.words.weight", (self.words,))
                if rule.ours == "words.weight"
                else rule.prefixed("joint.", f"{_BERT}embeddings.")
                for rule in bert_embedding_rules()
            ),
            *(rule.prefixed("joint.", _BERT) for rule in bert_layer_rules(range(self.joint_layers))),
            *(rule.prefixed("joint.", f"{_HEAD}0.") for rule in pooler_rules()),
            *(Rule(f"joint.{LOGIT}{kind}", (f"{_HEAD}1.{kind}",)) for kind in ("weight", "bias")),
        )


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each name as it is in the file, by the name without what wrappers of torch put before all of them."""
    inner = {name: name for name in names}
    while any(inner and all(name.startswith(wrapper) for name in inner) for wrapper in _WRAPPERS):
        inner = {name.partition(".")[2]: outer for name, outer in inner.items()}
    return inner


def layout_of(names: Sequence[str]) -> Layout:
    """The layout that the names are closest to; `check_names` says whether it is that one."""
    # transformers dropped the inner name in its fifth version.
    inner = f"{_TOWER}vision_model."
    tower = inner if any(name.startswith(inner) for name in names) else _TOWER
    is_local = any(re.match(rf"{re.escape(_ADAPTER)}[02]\.", name) for name in names)
    return Layout(
        tower=tower,
        tower_layers=_num_layers(names, f"{tower}encoder.layers."),
        joint_layers=_num_layers(names, f"{_BERT}encoder.layer."),
        adapter="local" if is_local else "compression",
        words=next((name for name in _OUTER_WORDS if name in names), _LANGUAGE_WORDS),
    )


def check_names(names: Sequence[str], rules: Sequence[Rule]) -> tuple[list[str], list[str], Counter[str]]:
    """Which names are missing, which nobody knows, and how many are left aside, by what they are.

    The language model's own words count as missing even where `text_embeddings` is read: a whole file has both.
    """
    needed = {name for rule in rules for name in rule.theirs}
    unexpected, aside = [], Counter[str]()
    for name in sorted(set(names) - needed):
        what = next((what for pattern, what in _NOT_NEEDED if re.fullmatch(pattern, name)), None)
        if what is None:
            unexpected.append(name)
        else:
            aside[what] += 1
    missing = missing_from(names, rules)
    if _LANGUAGE_WORDS not in needed and _LANGUAGE_WORDS not in names:
        missing.append(_LANGUAGE_WORDS)
    return missing, unexpected, aside


def twin_words(layout: Layout) -> tuple[str, str] | None:
    """The two names of the table of words, the one that is read first, where the file has it twice."""
    return None if layout.words == _LANGUAGE_WORDS else (layout.words, _LANGUAGE_WORDS)


def config_of(layout: Layout, shapes: Mapping[str, tuple[int, ...]], chosen: Chosen) -> EdjeConfig:
    """The configuration that the shapes and the choices make. All names have to be there. Raises `AuthorsError`."""

    sizes = _Sizes(shapes)
    *_, patch_size = sizes.axes(f"{layout.tower}embeddings.patch_embedding.weight", 4)
    positions = f"{layout.tower}embeddings.position_embedding.weight"
    num_patches = sizes.axes(positions, 2)[0]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise AuthorsError(f"{positions} has {num_patches} rows, which are no square of patches")
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
            preprocess=PreprocessConfig(image_size=side * patch_size, canonical_captions=chosen.canonical_captions),
            vision=VitConfig(
                patch_size=patch_size,
                dim=dim,
                num_layers=layout.tower_layers,
                num_heads=_heads("vision", dim, chosen.tower_heads, TOWER_HEADS),
                hidden_dim=sizes.hidden(f"{tower}mlp.fc1", f"{tower}mlp.fc2"),
                norm_eps=chosen.tower_eps,
            ),
            adapter=AdapterConfig(
                kind=layout.adapter,
                num_tokens=num_patches if is_local else sizes.axes(f"{_ADAPTER}query", 3)[1],
                hidden_dim=sizes.hidden(f"{_ADAPTER}{wide}", f"{_ADAPTER}{narrow}"),
            ),
            joint=JointConfig(
                dim=joint_dim,
                num_layers=layout.joint_layers,
                num_heads=_heads("joint", joint_dim, chosen.joint_heads, BERT_HEADS),
                hidden_dim=sizes.hidden(f"{joint}intermediate.dense", f"{joint}output.dense"),
                vocab_size=sizes.axes(layout.words, 2)[0],
                sep_id=chosen.sep_id,
                max_positions=sizes.axes(f"{_BERT}embeddings.position_embeddings.weight", 2)[0],
                norm_eps=chosen.joint_eps,
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
    """Reads numbers off shapes. Where several tensors tell the same number, the odd one out is not believed, so that
    it is the one named as misshapen."""

    shapes: Mapping[str, tuple[int, ...]]

    def axes(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of a tensor that has to have so many axes."""
        shape = self.shapes[name]
        if len(shape) != count or 0 in shape:
            raise AuthorsError(f"{name} is {size(shape)}, expected {count} axes")
        return shape

    def width(self, *sides: tuple[str, int]) -> int:
        """What most of these tensors have on these axes."""
        found = Counter(self.shapes[name][axis] for name, axis in sides if axis < len(self.shapes[name]))
        commonest = max(found, key=lambda each: found[each], default=0)
        if not commonest:
            raise AuthorsError(f"{sides[0][0]} is {size(self.shapes[sides[0][0]])}: it has to have a width")
        return commonest

    def hidden(self, first: str, second: str) -> int:
        """The width between two linear maps."""
        return self.width((f"{first}.weight", 0), (f"{first}.bias", 0), (f"{second}.weight", 1))


def _adapter_rules(kind: str) -> tuple[Rule, ...]:
    """Ours within an adapter, theirs within the projection."""
    linear = _LOCAL if kind == "local" else _COMPRESSION
    rules = [
        Rule(f"{ours}.{part}", (f"{theirs}.{part}",)) for ours, theirs in linear.items() for part in ("weight", "bias")
    ]
    if kind == "compression":
        rules.append(Rule("query", ("query",)))
        rules += (
            Rule(f"attention.attention.in_proj_{part}", (f"attention.in_proj_{part}",)) for part in ("weight", "bias")
        )
    return tuple(rules)


def _num_layers(names: Iterable[str], prefix: str) -> int:
    """One more than the highest layer's number; at least one, so that what is missing has a name."""
    numbers = (re.match(rf"{re.escape(prefix)}(\d{{1,2}})\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=1)


def _heads(part: str, dim: int, chosen: int | None, known: Mapping[int, int]) -> int:
    heads = chosen or known.get(dim)
    if heads is None:
        raise AuthorsError(
            f"the number of attention heads cannot be told from a width of {dim}: say it with --{part}-heads"
        )
    return heads
