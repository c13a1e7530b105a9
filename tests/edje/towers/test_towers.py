"""Vision towers of every kind compared with their libraries, and saved and loaded."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edje import checkpoint as files
from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointTampered, read_digest
from edje.config import AdapterConfig, PreprocessConfig, canonical_json, parse_config
from edje.init import write_untrained
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.optional import PackageMissing
from edje.tower_config import HubVisionConfig, TimmVisionConfig, VitConfig
from edje.towers.base import TowerError
from edje.towers.build import build_tower
from edje.towers.sources import load_tower
from edje.towers.vit import VisionTower
from edje.vocabulary import character_tokenizer
from graph_towers import GRAPH, noise, patch_graph

VIT = VitConfig(patch_size=8, dim=32, num_layers=1, num_heads=4, hidden_dim=48, stem="conv")
SIGLIP = HubVisionConfig(
    architecture="siglip_vision_model",
    patch_size=8,
    dim=32,
    num_layers=3,
    num_heads=4,
    hidden_dim=48,
    hidden_act="gelu_pytorch_tanh",
    norm_eps=1e-6,
    hidden_state="last",
)
CLIP = replace(
    SIGLIP, architecture="clip_vision_model", hidden_act="quick_gelu", norm_eps=1e-5, hidden_state="penultimate"
)
RESNET = TimmVisionConfig(model_name="test_resnet", dim=96, tokens_per_image=4, pooled_dim=96, num_heads=8)
SIZE = {"vit": 32, "transformers": 32, "timm": 64, "onnx": 16}
#: Package that each kind needs besides torch.
LIBRARY = {"vit": "torch", "transformers": "transformers", "timm": "timm", "onnx": "onnxruntime"}

every_kind = pytest.mark.parametrize(
    "vision", [VIT, SIGLIP, CLIP, RESNET, GRAPH], ids=["vit", "siglip", "clip", "timm", "onnx"]
)


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


def model_of(vision):
    pytest.importorskip(LIBRARY[vision.kind])
    config = replace(
        VARIANTS["tiny"],
        vision=vision,
        preprocess=PreprocessConfig(image_size=SIZE[vision.kind]),
        adapter=AdapterConfig(kind="compression", num_tokens=4, hidden_dim=16),
    )
    graph = patch_graph(noise(8, 3, 4, 4)).SerializeToString() if vision.kind == "onnx" else None
    model = build_edje(config, graph=graph)
    initialise_untrained(model, seed=0)
    return config, model.eval()


def some_pixels(config, seed=0):
    size = config.preprocess.image_size
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture
def graph_checkpoint(tmp_path):
    config, model = model_of(GRAPH)
    save_checkpoint(tmp_path / "model", config, model, character_tokenizer().to_str())
    return tmp_path / "model"


# All kinds


@every_kind
def test_a_towers_outputs_have_the_configured_shapes(vision):
    config, model = model_of(vision)

    tokens, pooled = model.run_tower(some_pixels(config))

    assert tokens.shape == (3, config.num_patches, vision.dim)
    assert pooled.shape == (3, vision.pooled_dim)


@every_kind
def test_a_configuration_with_this_tower_is_restored_from_its_json(vision):
    config, _ = model_of(vision)

    assert parse_config(canonical_json(config)) == config


@every_kind
def test_a_model_with_this_tower_is_loaded_as_it_was_saved(vision, tmp_path):
    config, model = model_of(vision)
    digest = save_checkpoint(tmp_path / "model", config, model, character_tokenizer().to_str())

    loaded = load_checkpoint(tmp_path / "model")

    pixels = some_pixels(config)
    with torch.inference_mode():
        found, expected = loaded.model.encode_images(pixels), model.encode_images(pixels)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert loaded.digest == digest


@every_kind
def test_tokens_do_not_depend_on_the_other_images_of_the_batch(vision):
    config, model = model_of(vision)
    pixels = some_pixels(config)

    together, alone = model.run_tower(pixels)[0][1:2], model.run_tower(pixels[1:2])[0]

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", [VIT, SIGLIP, RESNET], ids=["vit", "siglip", "timm"])
def test_the_same_seed_draws_the_same_tower(vision, tmp_path):
    config, _ = model_of(vision)

    one, same, other = (
        write_untrained(config, tmp_path / name, seed=seed) for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )

    assert one == same != other


@pytest.mark.parametrize("vision", [SIGLIP, RESNET, GRAPH], ids=["siglip", "timm", "onnx"])
def test_a_third_party_tower_stays_frozen_while_the_rest_trains(vision):
    config, model = model_of(vision)

    model.train()
    model.encode_images(some_pixels(config))[0].sum().backward()

    assert model.adapter.training
    assert not any(module.training for module in model.vision.modules())
    assert all(parameter.grad is None for parameter in model.vision.parameters())


def test_a_tower_whose_outputs_do_not_match_its_configuration_is_refused():
    _, model = model_of(RESNET)

    with pytest.raises(TowerError, match=r"\(16, 96, 96\).*\(4, 96, 96\)"):
        model.vision(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize(("vision", "package"), [(SIGLIP, "transformers"), (RESNET, "timm"), (GRAPH, "onnxruntime")])
def test_a_missing_package_is_reported_with_its_extra(vision, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(PackageMissing, match=rf"{package}.*extra 'train'"):
        build_tower(vision, SIZE[vision.kind], graph=b"")


@pytest.mark.parametrize(("vision", "size"), [(VIT, 30), (SIGLIP, 36)])
def test_an_image_size_that_is_no_multiple_of_the_patch_size_is_refused(vision, size):
    with pytest.raises(ValueError, match=f"an image size of {size} pixels is no multiple of the patch size 8"):
        vision.num_tokens(size)


# The local tower


def test_a_conv_stem_leads_to_the_same_grid():
    patch, conv = (VisionTower(replace(VIT, stem=stem), num_patches=16) for stem in ("patch", "conv"))

    assert conv.patches(noise(2, 3, 32, 32)).shape == patch.patches(noise(2, 3, 32, 32)).shape == (2, 32, 4, 4)


def test_each_convolution_of_a_conv_stem_doubles_the_channels():
    strides = [step for step in VisionTower(VIT, num_patches=16).patches if isinstance(step, nn.Conv2d)]

    assert [step.out_channels for step in strides] == [8, 16, 32, 32]


@pytest.mark.parametrize(("patch_size", "dim"), [(1, 32), (12, 48), (16, 36)])
def test_a_patch_size_or_width_that_a_conv_stem_cannot_reach_is_refused(patch_size, dim):
    with pytest.raises(ValueError, match="stem 'conv'"):
        replace(VIT, patch_size=patch_size, dim=dim)


# transformers


@pytest.mark.parametrize("vision", [SIGLIP, CLIP, replace(CLIP, hidden_state="last")])
def test_a_tower_of_the_hub_equals_the_librarys_model(vision):
    transformers = pytest.importorskip("transformers")
    names = ("Siglip", "Siglip") if vision.architecture == "siglip_vision_model" else ("CLIP", "CLIP")
    theirs = randomised(
        getattr(transformers, f"{names[0]}VisionModel")(
            getattr(transformers, f"{names[1]}VisionConfig")(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=32,
                patch_size=8,
                hidden_act=vision.hidden_act,
                layer_norm_eps=vision.norm_eps,
            )
        )
    )
    tower = build_tower(vision, 32)
    tower.model.load_state_dict(theirs.state_dict())
    pixels = noise(2, 3, 32, 32)

    tokens, pooled = tower(pixels)

    with torch.no_grad():
        seen = theirs(pixel_values=pixels, output_hidden_states=True)
    hidden = seen.last_hidden_state if vision.hidden_state == "last" else seen.hidden_states[2]
    first = 1 if vision.architecture == "clip_vision_model" else 0
    torch.testing.assert_close(tokens, hidden[:, first:])
    torch.testing.assert_close(pooled, seen.pooler_output)


@pytest.fixture
def published_clip(tmp_path):
    """A complete CLIP model, as a folder of the hub."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    words = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=shape | {"image_size": 32, "patch_size": 8}, text_config=shape | words, projection_dim=16
        )
    ).eval()
    model.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}'
    )
    return tmp_path / "clip", model


def test_a_published_model_is_loaded_with_its_weights_and_preprocessing(published_clip):
    folder, theirs = published_clip

    found = load_tower(f"hub:{folder}")

    assert found.config == CLIP
    assert found.preprocess == PreprocessConfig(
        image_size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), resample="bicubic"
    )
    pixels = noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(found.module(pixels)[0], expected)


def test_another_image_size_of_a_published_model_is_refused(published_clip):
    with pytest.raises(TowerError, match="32 pixels, not 64"):
        load_tower(f"hub:{published_clip[0]}", image_size=64)


def test_a_model_that_is_not_on_the_hub_is_reported_with_a_remedy(tmp_path):
    pytest.importorskip("transformers")

    with pytest.raises(TowerError, match="give a local folder"):
        load_tower(f"hub:{tmp_path}")


@pytest.mark.parametrize("source", ["siglip", "hub:", "ftp:model"])
def test_a_source_of_no_known_kind_is_refused(source):
    with pytest.raises(TowerError, match="hub:NAME, timm:NAME or onnx:PATH"):
        load_tower(source)


# timm


@pytest.mark.parametrize(("name", "num_tokens"), [("test_vit", 16), ("test_resnet", 4)])
def test_a_tower_of_timm_equals_the_librarys_model(name, num_tokens):
    timm = pytest.importorskip("timm")

    found = load_tower(f"timm:{name}", image_size=64, is_pretrained=False)

    theirs = timm.create_model(name, num_classes=0, **({"img_size": 64} if name == "test_vit" else {})).eval()
    theirs.load_state_dict(found.module.model.state_dict())
    pixels = noise(2, 3, 64, 64)
    with torch.no_grad():
        features = theirs.forward_features(pixels)
        pooled = theirs(pixels)
    tokens = features[:, 1:] if name == "test_vit" else features.reshape(2, -1, num_tokens).transpose(1, 2)
    assert found.config.tokens_per_image == num_tokens
    torch.testing.assert_close(found.module(pixels), (tokens, pooled))


def test_a_grid_with_its_channels_last_is_read_row_by_row():
    from edje.towers.timm_tower import patch_tokens

    grid = noise(2, 3, 5, 7)
    model = SimpleNamespace(
        output_fmt="NHWC", forward_features=lambda _: grid, forward_head=lambda features, pre_logits: features[:, 0, 0]
    )

    assert torch.equal(patch_tokens(model, torch.zeros(2, 3, 8, 8))[0], grid.reshape(2, 15, 7))


def test_an_unknown_timm_model_is_reported_with_the_way_to_list_names():
    pytest.importorskip("timm")

    with pytest.raises(TowerError, match="list_models"):
        load_tower("timm:no_such_model")


# ONNX


@pytest.mark.parametrize("has_pooled", [True, False])
def test_a_graph_gives_what_torch_computes(has_pooled, tmp_path):
    weight = noise(8, 3, 4, 4)
    (tmp_path / "tower.onnx").write_bytes(patch_graph(weight, has_pooled=has_pooled).SerializeToString())

    found = load_tower(f"onnx:{tmp_path / 'tower.onnx'}")

    assert found.config == replace(GRAPH, num_heads=8)
    assert found.preprocess.image_size == 16
    pixels = noise(2, 3, 16, 16)
    tokens = nn.functional.conv2d(pixels, weight, stride=4).flatten(2).transpose(1, 2)
    pooled = tokens.amax(dim=1) if has_pooled else tokens.mean(dim=1)
    torch.testing.assert_close(found.module(pixels), (tokens, pooled), atol=1e-5, rtol=1e-5)


def test_a_graph_for_any_size_needs_an_image_size(tmp_path):
    graph = patch_graph(noise(8, 3, 4, 4), inputs=("N", 3, "H", "W"))
    (tmp_path / "tower.onnx").write_bytes(graph.SerializeToString())

    assert load_tower(f"onnx:{tmp_path / 'tower.onnx'}", image_size=24).config.tokens_per_image == 36
    with pytest.raises(TowerError, match="give one \\(image_size\\)"):
        load_tower(f"onnx:{tmp_path / 'tower.onnx'}")


def test_a_missing_graph_is_named(tmp_path):
    with pytest.raises(TowerError, match=r"nowhere\.onnx cannot be read"):
        load_tower(f"onnx:{tmp_path / 'nowhere.onnx'}")


def test_a_model_whose_tower_is_a_graph_is_not_built_without_it(tmp_path):
    config, _ = model_of(GRAPH)

    with pytest.raises(TowerError, match="needs the content of its graph"):
        write_untrained(config, tmp_path / "model", seed=0)


def test_a_graph_with_external_weights_is_refused(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    onnx.save(
        patch_graph(noise(8, 3, 4, 4)),
        tmp_path / "tower.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=100,
    )
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would look for them

    with pytest.raises(TowerError, match="external data"):
        load_tower("onnx:tower.onnx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "features"}, "has the outputs features and none named 'tokens'"),
        ({"inputs": (1, 3, 16, 16)}, "open number of images"),
        ({"inputs": ("N", 3, 16, 20)}, "must be square"),
    ],
)
def test_a_graph_of_another_form_is_refused_with_its_form(changes, message):
    graph = patch_graph(noise(8, 3, 4, 4), **changes).SerializeToString()

    with pytest.raises(TowerError, match=message):
        build_tower(GRAPH, 16, graph)


def test_half_a_graph_is_refused():
    graph = patch_graph(noise(8, 3, 4, 4)).SerializeToString()

    with pytest.raises(TowerError, match="cannot open the graph"):
        build_tower(GRAPH, 16, graph[: len(graph) // 2])


def test_the_graph_is_part_of_the_digest(graph_checkpoint):
    path = graph_checkpoint / files.GRAPH_FILE
    path.write_bytes(patch_graph(noise(8, 3, 4, 4, seed=1)).SerializeToString())

    with pytest.raises(CheckpointTampered):
        load_checkpoint(graph_checkpoint)


def test_a_checkpoint_without_its_graph_is_incomplete(graph_checkpoint):
    (graph_checkpoint / files.GRAPH_FILE).unlink()

    with pytest.raises(CheckpointIncomplete, match=files.GRAPH_FILE):
        read_digest(graph_checkpoint)


def test_a_checkpoint_whose_library_is_missing_is_reported(graph_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(CheckpointMismatch, match=r"cannot be loaded here: .* package onnxruntime"):
        load_checkpoint(graph_checkpoint)


def test_a_tower_on_the_cpu_feeds_an_adapter_in_another_precision():
    config, model = model_of(GRAPH)
    model.adapter.to(torch.bfloat16)

    assert model.encode_images(some_pixels(config))[0].dtype == torch.bfloat16


#: Path of the public MobileNetV2 graph (49 tokens of 1280); the test is skipped without it.
MOBILENET_V2 = Path(os.environ.get("EDJE_MOBILENET_V2", Path(__file__).parents[4] / "shared" / "data" / "mobilenet_v2"))


def test_a_published_graph_becomes_part_of_the_checkpoint(tmp_path):
    pytest.importorskip("onnxruntime")
    paths = sorted(MOBILENET_V2.glob("*.onnx"))
    if not paths:
        pytest.skip("no MobileNetV2 graph here: set EDJE_MOBILENET_V2 to its folder")
    found = load_tower(f"onnx:{paths[0]}")
    config = replace(VARIANTS["tiny"], vision=found.config, preprocess=found.preprocess)
    model = build_edje(config, graph=paths[0].read_bytes())
    initialise_untrained(model, seed=0)
    save_checkpoint(tmp_path / "model", config, model, character_tokenizer().to_str())

    tokens, pooled = load_checkpoint(tmp_path / "model").model.run_tower(some_pixels(config))

    assert tokens.shape == (3, 49, 1280)
    torch.testing.assert_close(pooled, tokens.mean(dim=1), atol=1e-3, rtol=1e-3)
