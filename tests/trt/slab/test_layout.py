"""The bytes of a slot."""

import pytest

from trt.slab.layout import SlotLayout


@pytest.mark.parametrize(
    ("storage", "token_bytes", "scale_bytes"),
    [("fp16", 49_152, 0), ("bf16", 49_152, 0), ("int8", 24_576, 256), ("int4", 12_288, 1_536)],
)
def test_a_slot_has_the_published_size(storage, token_bytes, scale_bytes):
    layout = SlotLayout(storage, num_tokens=64, token_dim=384)

    assert (layout.token_bytes, layout.scale_bytes) == (token_bytes, scale_bytes)
