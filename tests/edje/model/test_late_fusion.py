"""Late-fusion encoders compared with a plain float64 reference, and their cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edje.config import JointConfig
from edje.model.edje import build_edje
from edje.model.flops import cost_of, joint_flops
from edje.model.joint import JointEncoder
from edje.model.late_fusion import LateFusionEncoder
from edje.model.variants import VARIANTS
from plain_encoder import PlainEncoder

NUM_VISUAL = 7
FULL = JointConfig(dim=32, num_layers=3, num_heads=4, hidden_dim=48, vocab_size=50, sep_id=3, max_positions=64)
LATE = replace(FULL, kind="late", text_layers=2, visual_layers=1)
MINIMAL = replace(LATE, kind="minimal")
MAXSIM = replace(LATE, kind="maxsim", num_layers=0, match_dim=8)
APART = {
    "late": LATE,
    "late with match": replace(LATE, match_dim=8),
    "minimal": MINIMAL,
    "minimal with match": replace(MINIMAL, match_dim=8),
    "maxsim": MAXSIM,
}


def build(config: JointConfig):
    """Weights under which scores spread over about 1, far above the tolerances."""
    joint = LateFusionEncoder(config, NUM_VISUAL) if config.is_late_fusion else JointEncoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in joint.named_parameters():
            is_matrix = parameter.ndim == 2 and not name.endswith(("words.weight", "positions.weight", "types.weight"))
            std = 2.0 * parameter.shape[-1] ** -0.5 if is_matrix else 0.3
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
    return joint.eval().requires_grad_(False)


JOINTS = {name: build(config) for name, config in ({"full": FULL} | APART).items()}
apart = pytest.mark.parametrize("joint", [JOINTS[name] for name in APART], ids=list(APART))


def random_text(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, FULL.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def random_tokens(seed: int, num_images: int) -> torch.Tensor:
    return torch.randn(num_images, NUM_VISUAL, FULL.dim, generator=torch.Generator().manual_seed(seed))


def score(joint, text, tokens):
    """Logits of one caption with each image, from the stored visual tokens."""
    visual = joint.encode_visual(tokens)
    states = joint.encode_queries(text[None]).expand(len(tokens), -1, -1)
    return joint.score(states, visual)


def plain_score(name, text, tokens):
    config = ({"full": FULL} | APART)[name]
    plain = PlainEncoder(JOINTS[name], config)
    logits = [plain.logit(text.numpy(), image.double().numpy()) for image in tokens]
    return torch.tensor(logits, dtype=torch.float32)


@pytest.mark.parametrize("length", [2, 5, 20])
@pytest.mark.parametrize("name", APART)
def test_a_logit_equals_the_plain_reference(name, length):
    text, tokens = random_text(length, length), random_tokens(length, 2)

    torch.testing.assert_close(score(JOINTS[name], text, tokens), plain_score(name, text, tokens), atol=1e-4, rtol=0)


@apart
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6), filler=st.integers(0, FULL.vocab_size - 1))
def test_a_score_does_not_depend_on_the_padding_of_others(joint, lengths, filler):
    texts = [random_text(number, length) for number, length in enumerate(lengths)]
    tokens = random_tokens(1, len(texts))
    padded = torch.full((len(texts), max(lengths)), filler)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text

    states = joint.encode_queries(padded, torch.tensor(lengths))
    together = joint.score(states, joint.encode_visual(tokens), torch.tensor(lengths))

    alone = [score(joint, text, image[None])[0] for text, image in zip(texts, tokens, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["full", "late", "minimal"])
def test_computing_only_cls_in_the_last_layer_gives_the_same_logit(name):
    joint, lengths = JOINTS[name], torch.tensor([4, 9, 6])
    text = torch.stack([random_text(number, 9) for number in range(3)])
    states, visual = joint.encode_queries(text, lengths), joint.encode_visual(random_tokens(2, 3))

    everything = joint.text_states(states, visual, lengths)

    assert everything.shape == states.shape
    expected = joint.head(everything[:, 0])
    torch.testing.assert_close(joint.score(states, visual, lengths), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["late with match", "minimal with match", "maxsim"])
def test_the_similarity_matrix_holds_the_scores_of_its_pairs(name):
    joint, lengths = JOINTS[name], torch.tensor([4, 9])
    text = torch.stack([random_text(number, 9) for number in range(2)])
    states, visual = joint.encode_queries(text, lengths), joint.encode_visual(random_tokens(3, 5))

    matrix = joint.similarity(states, visual, lengths)

    rows = [joint.match.score_pairs(states[[q]].expand(5, -1, -1), visual, lengths[[q]].expand(5)) for q in range(2)]
    torch.testing.assert_close(matrix, torch.stack(rows), atol=1e-5, rtol=0)


@apart
@pytest.mark.parametrize("lengths", [None, [3, 6, 1]])
def test_parts_that_were_computed_before_give_the_same_logit(joint, lengths):
    text = joint.encode_queries(torch.stack([random_text(seed, 6) for seed in range(3)]))
    visual = joint.encode_visual(torch.randn(3, NUM_VISUAL, FULL.dim, generator=torch.Generator().manual_seed(1)))
    text_lengths = None if lengths is None else torch.tensor(lengths)
    parts = {}
    if joint.match is not None:
        texts, visuals = joint.match.project_text(text), joint.match.project_visual(visual)
        parts["match"] = joint.match.compare(texts, visuals, text_lengths)
    if joint.kind == "minimal":
        parts["keys_values"] = joint.visual_keys_values(visual)

    logits = joint.score(text, visual, text_lengths, **parts)

    torch.testing.assert_close(logits, joint.score(text, visual, text_lengths), rtol=0, atol=1e-6)


def test_the_logit_of_maxsim_is_its_late_interaction():
    states, visual = JOINTS["maxsim"].encode_queries(random_text(4, 6)[None]), random_tokens(4, 5)

    matrix = JOINTS["maxsim"].similarity(states, visual)

    logits = JOINTS["maxsim"].score(states.expand(5, -1, -1), visual)
    torch.testing.assert_close(matrix[0], logits, atol=1e-5, rtol=0)


def test_a_similarity_without_a_late_interaction_is_an_error():
    with pytest.raises(ValueError, match="match_dim"):
        JOINTS["minimal"].similarity(torch.zeros(1, 2, FULL.dim), torch.zeros(1, NUM_VISUAL, FULL.dim))


@apart
def test_stored_visual_tokens_depend_on_their_positions(joint):
    text, tokens = random_text(5, 6), random_tokens(5, 1)
    states, stored = joint.encode_queries(text[None]), joint.encode_visual(tokens)
    order = torch.randperm(NUM_VISUAL, generator=torch.Generator().manual_seed(0))

    again = joint.encode_visual(tokens[:, order])

    assert (again - stored[:, order]).abs().max() > 1e-3
    assert (joint.score(states, again) - joint.score(states, stored)).abs() > 1e-3


def test_a_late_interaction_ignores_positions():
    joint = JOINTS["maxsim"]
    states, stored = joint.encode_queries(random_text(5, 6)[None]), joint.encode_visual(random_tokens(5, 1))

    torch.testing.assert_close(joint.score(states, stored.flip(1)), joint.score(states, stored), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in APART if name != "maxsim"])
def test_the_fusion_layers_depend_on_the_positions_of_visual_tokens(name):
    joint = JOINTS[name]
    states, stored = joint.encode_queries(random_text(5, 6)[None]), joint.encode_visual(random_tokens(5, 1))

    assert (joint.score(states, stored.flip(1)) - joint.score(states, stored)).abs() > 1e-3


@apart
def test_stored_visual_tokens_do_not_depend_on_the_batch(joint):
    tokens = random_tokens(6, 4)

    torch.testing.assert_close(joint.encode_visual(tokens)[2:3], joint.encode_visual(tokens[2:3]), atol=1e-5, rtol=0)


def test_a_minimal_encoder_does_not_update_visual_tokens():
    joint, states = JOINTS["minimal"], JOINTS["minimal"].encode_queries(random_text(7, 6)[None])
    seen = []
    for layer in joint.layers:
        layer.visual_kv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stored = joint.encode_visual(random_tokens(7, 1))

    joint.score(states, stored)

    assert len(seen) == FULL.num_layers
    where = joint.meeting_positions.weight
    assert all(torch.equal(each, stored + where) for each in seen)


# --- cost -------------------------------------------------------------------------------------------------------------


def counted(call) -> int:
    """FLOPs of the matrix products that torch executes."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_text", [2, 11])
@pytest.mark.parametrize("name", JOINTS)
def test_the_counted_flops_equal_the_computed_ones(name, num_text):
    config, joint = ({"full": FULL} | APART)[name], JOINTS[name]
    text, tokens = random_text(0, num_text)[None], random_tokens(0, 1)
    states, visual = joint.encode_queries(text), joint.encode_visual(tokens)

    stated = cost_of(config, num_text, NUM_VISUAL)

    assert counted(lambda: joint.score(states, visual)) == stated.per_pair
    assert counted(lambda: joint.encode_queries(text)) == stated.per_query
    assert counted(lambda: joint.encode_visual(tokens)) == stated.per_image


@pytest.mark.parametrize("name", ["full", "late with match", "minimal with match"])
def test_the_counted_flops_of_a_full_last_layer_equal_the_computed_ones(name):
    config, joint = ({"full": FULL} | APART)[name], JOINTS[name]
    states, visual = joint.encode_queries(random_text(0, 5)[None]), joint.encode_visual(random_tokens(0, 1))

    layers = counted(lambda: joint.text_states(states, visual))

    assert joint_flops(replace(config, match_dim=0), 5, NUM_VISUAL) == layers


def layer_gflops(name: str) -> float:
    """FLOPs of one more fusion layer, for 18 text and 64 visual tokens."""
    joint = VARIANTS[name].joint
    more = replace(joint, num_layers=joint.num_layers + 1)
    return (joint_flops(more, 18, 64) - joint_flops(joint, 18, 64)) / 1e9


def test_a_minimal_fusion_layer_costs_a_third_of_a_full_layer():
    assert round(layer_gflops("paper-l16-minimal"), 1) == 0.1
    assert round(layer_gflops("paper-l16"), 1) == round(layer_gflops("paper-l16-late"), 1) == 0.3


def test_the_cheaper_encoders_have_the_documented_cost():
    costs = {name: cost_of(VARIANTS[f"paper-l16{name}"].joint, 18, 64) for name in ("", "-late", "-minimal")}

    assert {name: round(cost.per_pair / 1e9, 1) for name, cost in costs.items()} == {
        "": 3.4,
        "-late": 1.6,
        "-minimal": 0.4,
    }
    assert (costs[""].per_query, costs[""].per_image) == (0, 0)
    assert costs["-late"].per_query == costs["-minimal"].per_query > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_named_configuration_encodes_and_scores(name):
    config = VARIANTS[name]
    model, size = build_edje(config, device="meta").to("meta"), config.preprocess.image_size
    text = torch.zeros(3, config.preprocess.max_text_tokens, dtype=torch.long, device="meta")

    tokens, _ = model.encode_images(torch.zeros(3, 3, size, size, dtype=torch.uint8, device="meta"))
    states = model.encode_queries(text, torch.zeros(3, dtype=torch.long, device="meta"))

    assert tokens.shape == (3, config.adapter.num_tokens, config.joint.dim)
    assert states.shape == (3, config.preprocess.max_text_tokens, config.joint.dim)
    assert model.score(states, tokens).shape == (3,)
