"""Named model shapes, as data. Numbers of the paper's models: arXiv 2510.06820, section 4 and appendix."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from edje.config import AdapterConfig, EdjeConfig, JointConfig, PreprocessConfig, VisionConfig

_SIGLIP2_L16 = VisionConfig(patch_size=16, dim=1024, num_layers=24, num_heads=16, hidden_dim=4096)
_SIGLIP2_B16 = VisionConfig(patch_size=16, dim=768, num_layers=12, num_heads=12, hidden_dim=3072)
#: BERT's vocabulary and one `<image>` token; [SEP] is BERT's.
_MINILM_L12 = JointConfig(dim=384, num_layers=12, num_heads=12, hidden_dim=1536, vocab_size=30_523, sep_id=102)
_AT_384 = PreprocessConfig(image_size=384)


def _paper(name: str, vision: VisionConfig, num_tokens: int) -> EdjeConfig:
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
        vision=VisionConfig(patch_size=16, dim=64, num_layers=2, num_heads=4, hidden_dim=128),
        adapter=AdapterConfig(kind="compression", num_tokens=16, hidden_dim=256),
        joint=JointConfig(
            dim=64, num_layers=2, num_heads=4, hidden_dim=128, vocab_size=1_024, sep_id=3, max_positions=128
        ),
    ),
)

VARIANTS: Final = {variant.name: variant for variant in _ALL}
