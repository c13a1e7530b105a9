"""The model compared with its published sizes, a plain float64 BERT and transformers' modules."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.config import AdapterConfig, JointConfig, canonical_json, parse_config
from edje.model.edje import build_edje
from edje.model.flops import joint_flops
from edje.model.initialisation import initialise_untrained
from edje.model.joint import JointEncoder
from edje.model.variants import VARIANTS
from edje.tower_config import VitConfig
from edje.towers.vit import VisionTower
from plain_encoder import PlainEncoder

JOINT = JointConfig(dim=32, num_layers=3, num_heads=4, hidden_dim=48, vocab_size=50, sep_id=3, max_positions=64)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def joint():
    return randomise(JointEncoder(JOINT))


def test_the_joint_encoder_has_the_papers_parameters():
    model = build_edje(VARIANTS["paper-l16"], device="meta")

    assert num_parameters(model.joint) == 33_360_769
    assert num_parameters(model.joint.layers) == 21_293_568
    embeddings = (model.joint.words, model.joint.positions, model.joint.types, model.joint.norm)
    assert sum(map(num_parameters, embeddings)) == 11_918_976


def test_the_adapter_has_the_papers_parameters():
    assert num_parameters(build_edje(VARIANTS["paper-l16"], device="meta").adapter) == 23_545_216


def test_the_tiny_variant_stays_under_a_million_parameters():
    assert num_parameters(build_edje(VARIANTS["tiny"], device="meta")) < 1_000_000


@pytest.mark.parametrize(("num_text", "gflops"), [(18, 3.65), (31, 4.25), (63, 5.74)])
def test_a_pair_costs_the_published_operations(num_text, gflops):
    joint = VARIANTS["paper-l16"].joint
    sequence = num_text + 64 + 1

    assert joint_flops(joint, num_text, 64) == 42_467_328 * sequence + 18_432 * sequence**2
    assert round(joint_flops(joint, num_text, 64) / 1e9, 2) == gflops


def test_computing_only_cls_in_the_last_layer_saves_seven_percent():
    joint = VARIANTS["paper-l16"].joint

    saved = 1 - joint_flops(joint, 18, 64, cls_only_last_layer=True) / joint_flops(joint, 18, 64)

    assert round(100 * saved, 1) == 6.9


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_is_restored_from_its_json(name):
    assert parse_config(canonical_json(VARIANTS[name])) == VARIANTS[name]


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": AdapterConfig(kind="local", num_tokens=15)},
        {"adapter": AdapterConfig(kind="compression", num_tokens=80)},
        {"vision": VitConfig(patch_size=15, dim=64, num_layers=1, num_heads=4, hidden_dim=8)},
        {"joint": replace(VARIANTS["tiny"].joint, num_heads=5)},
        {"joint": replace(VARIANTS["tiny"].joint, sep_id=1_024)},
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change):
    with pytest.raises(ValueError, match=r"\d"):
        replace(VARIANTS["tiny"], **change)


def random_text(seed, length):
    return torch.randint(0, JOINT.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def random_visual(seed, num_pairs, num_tokens=7):
    return torch.randn(num_pairs, num_tokens, JOINT.dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [2, 5, 20])
def test_a_logit_equals_the_plain_reference(joint, length):
    text = random_text(length, length)
    visual = random_visual(length, 1)

    logit = joint.score(joint.encode_queries(text[None]), visual)[0]

    expected = PlainEncoder(joint, JOINT).logit(text.numpy(), visual[0].double().numpy())
    assert float(logit) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6), filler=st.integers(0, JOINT.vocab_size - 1))
def test_a_score_does_not_depend_on_the_padding_of_others(joint, lengths, filler):
    texts = [random_text(number, length) for number, length in enumerate(lengths)]
    visual = random_visual(1, len(texts))
    padded = torch.full((len(texts), max(lengths)), filler)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text

    together = joint.score(joint.encode_queries(padded), visual, torch.tensor(lengths))

    alone = [
        joint.score(joint.encode_queries(text[None]), tokens[None])[0]
        for text, tokens in zip(texts, visual, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)


def test_the_joint_encoder_equals_transformers_bert(joint):
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=JOINT.dim,
            num_hidden_layers=JOINT.num_layers,
            num_attention_heads=JOINT.num_heads,
            intermediate_size=JOINT.hidden_dim,
            vocab_size=JOINT.vocab_size,
            max_position_embeddings=JOINT.max_positions,
        )
    ).eval()
    ours = joint.state_dict()
    theirs = {
        "embeddings.word_embeddings.weight": ours["words.weight"],
        "embeddings.position_embeddings.weight": ours["positions.weight"],
        "embeddings.token_type_embeddings.weight": ours["types.weight"],
        "embeddings.LayerNorm.weight": ours["norm.weight"],
        "embeddings.LayerNorm.bias": ours["norm.bias"],
        "pooler.dense.weight": ours["head.pooler.weight"],
        "pooler.dense.bias": ours["head.pooler.bias"],
    }
    for number in range(JOINT.num_layers):
        for kind in ("weight", "bias"):
            mine, layer = f"layers.{number}", f"encoder.layer.{number}"
            parts = ours[f"{mine}.attention.qkv.{kind}"].chunk(3)
            for part, name in zip(parts, ("query", "key", "value"), strict=True):
                theirs[f"{layer}.attention.self.{name}.{kind}"] = part
            theirs[f"{layer}.attention.output.dense.{kind}"] = ours[f"{mine}.attention.out.{kind}"]
            theirs[f"{layer}.attention.output.LayerNorm.{kind}"] = ours[f"{mine}.attention_norm.{kind}"]
            theirs[f"{layer}.intermediate.dense.{kind}"] = ours[f"{mine}.mlp.fc1.{kind}"]
            theirs[f"{layer}.output.dense.{kind}"] = ours[f"{mine}.mlp.fc2.{kind}"]
            theirs[f"{layer}.output.LayerNorm.{kind}"] = ours[f"{mine}.mlp_norm.{kind}"]
    bert.load_state_dict(theirs)
    text, visual = random_text(4, 9)[None].expand(3, -1), random_visual(4, 3)
    last = joint.words.weight[JOINT.sep_id].expand(3, 1, -1)

    with torch.no_grad():
        pooled = bert(
            inputs_embeds=torch.cat((joint.words(text), visual, last), dim=1),
            token_type_ids=torch.tensor([[0] * 9 + [1] * 8]).expand(3, -1),
        ).pooler_output

    torch.testing.assert_close(
        joint.score(joint.encode_queries(text), visual), joint.head.out(pooled)[:, 0], atol=1e-5, rtol=0
    )


def test_the_vision_tower_equals_transformers_siglip():
    transformers = pytest.importorskip("transformers")
    config = VitConfig(patch_size=8, dim=32, num_layers=2, num_heads=4, hidden_dim=48)
    tower = randomise(VisionTower(config, num_patches=16))
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    ours = tower.state_dict()
    theirs = {
        "embeddings.patch_embedding.weight": ours["patches.weight"],
        "embeddings.patch_embedding.bias": ours["patches.bias"],
        "embeddings.position_embedding.weight": ours["positions"][0],
        "post_layernorm.weight": ours["norm.weight"],
        "post_layernorm.bias": ours["norm.bias"],
        "head.probe": ours["pool.probe"],
    }
    for kind in ("weight", "bias"):
        theirs[f"head.attention.in_proj_{kind}"] = ours[f"pool.attention.attention.in_proj_{kind}"]
        theirs[f"head.attention.out_proj.{kind}"] = ours[f"pool.attention.attention.out_proj.{kind}"]
        theirs[f"head.layernorm.{kind}"] = ours[f"pool.norm.{kind}"]
        for number in range(2):
            mine, layer = f"layers.{number}", f"encoder.layers.{number}"
            parts = ours[f"{mine}.attention.qkv.{kind}"].chunk(3)
            for part, name in zip(parts, ("q", "k", "v"), strict=True):
                theirs[f"{layer}.self_attn.{name}_proj.{kind}"] = part
            theirs[f"{layer}.self_attn.out_proj.{kind}"] = ours[f"{mine}.attention.out.{kind}"]
            theirs[f"{layer}.layer_norm1.{kind}"] = ours[f"{mine}.attention_norm.{kind}"]
            theirs[f"{layer}.layer_norm2.{kind}"] = ours[f"{mine}.mlp_norm.{kind}"]
            for name in ("fc1", "fc2"):
                theirs[f"{layer}.mlp.{name}.{kind}"] = ours[f"{mine}.mlp.{name}.{kind}"]
                theirs[f"head.mlp.{name}.{kind}"] = ours[f"pool.mlp.{name}.{kind}"]
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in siglip.state_dict()) else ""
    siglip.load_state_dict({prefix + name: tensor for name, tensor in theirs.items()})
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected = siglip(pixel_values=pixels)

    patches, pooled = tower(pixels)
    torch.testing.assert_close(patches, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_the_local_adapter_keeps_every_patch():
    tiny = VARIANTS["tiny"]
    model = build_edje(replace(tiny, adapter=AdapterConfig(kind="local", num_tokens=16, hidden_dim=32)))

    tokens, _ = model.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))

    assert tokens.shape == (2, 16, 64)


def test_pixels_are_normalised_to_plus_and_minus_one():
    model = build_edje(VARIANTS["tiny"])
    seen = []
    model.vision.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pixels[..., 32:] = 255

    model.encode_images(pixels)

    torch.testing.assert_close(seen[0][..., :32], torch.full((1, 3, 64, 32), -1.0))
    torch.testing.assert_close(seen[0][..., 32:], torch.full((1, 3, 64, 32), 1.0))


def test_untrained_scores_differ_between_pairs():
    model = build_edje(VARIANTS["tiny"])
    initialise_untrained(model, seed=0)
    pixels = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    with torch.inference_mode():
        tokens, _ = model.encode_images(pixels)
        text = model.encode_queries(torch.tensor([[2, 40, 41, 42, 3], [2, 90, 91, 92, 3]]))
        logits = torch.stack([model.score(one.expand(6, -1, -1), tokens) for one in text])

    assert logits.std(dim=1).min() > 0.05
    assert (logits[0] - logits[1]).abs().max() > 0.1
