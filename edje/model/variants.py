"""Named model shapes, as data. Numbers of the paper's models: arXiv 2510.06820, section 4 and appendix."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

from edje.config import AdapterConfig, EdjeConfig, JointConfig, PreprocessConfig
from edje.tower_config import VitConfig

_SIGLIP2_L16 = VitConfig(patch_size=16, dim=1024, num_layers=24, num_heads=16, hidden_dim=4096)
_SIGLIP2_B16 = VitConfig(patch_size=16, dim=768, num_layers=12, num_heads=12, hidden_dim=3072)
#: BERT's vocabulary and one `<image>` token; [SEP] is BERT's.
_MINILM_L12 = JointConfig(dim=384, num_layers=12, num_heads=12, hidden_dim=1536, vocab_size=30_523, sep_id=102)
_AT_384 = PreprocessConfig(image_size=384)


def _paper(name: str, vision: VitConfig, num_tokens: int) -> EdjeConfig:
    adapter = AdapterConfig(kind="compression", num_tokens=num_tokens)
    return EdjeConfig(name, trained=False, preprocess=_AT_384, vision=vision, adapter=adapter, joint=_MINILM_L12)


_ALL: Final = (
    _paper("paper-l16", _SIGLIP2_L16, num_tokens=64),
    _paper("paper-l16-32", _SIGLIP2_L16, num_tokens=32),
    _paper("paper-l16-128", _SIGLIP2_L16, num_tokens=128),
    _paper("paper-b16", _SIGLIP2_B16, num_tokens=64),
    # The distillation teacher. 640 positions: all 576 patches and 64 tokens of text do not fit into BERT's 512.
    EdjeConfig(
        name="paper-l16-local",
        trained=False,
        preprocess=_AT_384,
        vision=_SIGLIP2_L16,
        adapter=AdapterConfig(kind="local", num_tokens=576),
        joint=replace(_MINILM_L12, max_positions=640),
    ),
    # For tests and demonstrations: the same code path in under a million parameters. The vocabulary is the
    # character one of `edje.vocabulary`.
    EdjeConfig(
        name="tiny",
        trained=False,
        preprocess=PreprocessConfig(image_size=64),
        vision=VitConfig(patch_size=16, dim=64, num_layers=2, num_heads=4, hidden_dim=128),
        adapter=AdapterConfig(kind="compression", num_tokens=16, hidden_dim=256),
        joint=JointConfig(
            dim=64, num_layers=2, num_heads=4, hidden_dim=128, vocab_size=1_024, sep_id=3, max_positions=128
        ),
    ),
)


def _apart(
    of: EdjeConfig, kind: Literal["late", "minimal", "maxsim"], *, before: int, visual: int, after: int, match_dim: int
) -> EdjeConfig:
    """The same model with an encoder in which text and image meet after `before` and `visual` layers of their own."""
    joint = replace(
        of.joint, kind=kind, text_layers=before, visual_layers=visual, num_layers=after, match_dim=match_dim
    )
    return replace(of, name=f"{of.name}-{kind}", joint=joint)


_BY_NAME: Final = {variant.name: variant for variant in _ALL}
_L16, _TINY = _BY_NAME["paper-l16"], _BY_NAME["tiny"]
_APART: Final = (
    _apart(_L16, "late", before=6, visual=2, after=6, match_dim=128),
    _apart(_L16, "minimal", before=6, visual=2, after=4, match_dim=128),
    _apart(_TINY, "late", before=1, visual=1, after=2, match_dim=0),
    _apart(_TINY, "minimal", before=1, visual=1, after=2, match_dim=32),
    _apart(_TINY, "maxsim", before=1, visual=1, after=0, match_dim=32),
)

VARIANTS: Final = _BY_NAME | {variant.name: variant for variant in _APART}
