"""Named model configurations. Sizes of the paper's models: arXiv 2510.06820, section 4 and appendix."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

from edje.config import AdapterConfig, EdjeConfig, JointConfig, PreprocessConfig
from edje.tower_config import VitConfig

_SIGLIP2_L16 = VitConfig(patch_size=16, dim=1024, num_layers=24, num_heads=16, hidden_dim=4096)
_SIGLIP2_B16 = VitConfig(patch_size=16, dim=768, num_layers=12, num_heads=12, hidden_dim=3072)
#: BERT's vocabulary with one `<image>` token; `sep_id` is BERT's [SEP].
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
    # The distillation teacher. BERT's 512 positions are too few for 576 patches and 64 text tokens.
    EdjeConfig(
        name="paper-l16-local",
        trained=False,
        preprocess=_AT_384,
        vision=_SIGLIP2_L16,
        adapter=AdapterConfig(kind="local", num_tokens=576),
        joint=replace(_MINILM_L12, max_positions=640),
    ),
    # For tests and demonstrations: less than a million parameters, with the character vocabulary of
    # `edje.vocabulary`.
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


def _late_fusion(
    base: EdjeConfig, kind: Literal["late", "minimal", "maxsim"], *, text: int, visual: int, fusion: int, match_dim: int
) -> EdjeConfig:
    """Return the model with a late-fusion encoder of these numbers of text, visual and fusion layers."""
    joint = replace(
        base.joint, kind=kind, text_layers=text, visual_layers=visual, num_layers=fusion, match_dim=match_dim
    )
    return replace(base, name=f"{base.name}-{kind}", joint=joint)


_BY_NAME: Final = {variant.name: variant for variant in _ALL}
_L16, _TINY = _BY_NAME["paper-l16"], _BY_NAME["tiny"]
_LATE_FUSION: Final = (
    _late_fusion(_L16, "late", text=6, visual=2, fusion=6, match_dim=128),
    _late_fusion(_L16, "minimal", text=6, visual=2, fusion=4, match_dim=128),
    _late_fusion(_TINY, "late", text=1, visual=1, fusion=2, match_dim=0),
    _late_fusion(_TINY, "minimal", text=1, visual=1, fusion=2, match_dim=32),
    _late_fusion(_TINY, "maxsim", text=1, visual=1, fusion=0, match_dim=32),
)

VARIANTS: Final = _BY_NAME | {variant.name: variant for variant in _LATE_FUSION}
