"""Adapters: their tokens, and how these depend on the positions of the patches."""

from dataclasses import replace

import pytest
import torch

from edje.config import AdapterConfig
from edje.model.adapter import PatchPositions
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_for_training
from edje.model.variants import VARIANTS

NUM_PATCHES = 16
COMPRESSORS = ("compression", "decoder")
KINDS = ("local", *COMPRESSORS)


def drawn(kind, *, places, num_tokens=NUM_PATCHES):
    adapter = AdapterConfig(kind=kind, num_tokens=num_tokens, hidden_dim=32, places=places)
    model = build_edje(replace(VARIANTS["tiny"], adapter=adapter))
    initialise_for_training(model, seed=0)
    return model


def patches_alike(num_images=1):
    """The same patch at every position: tokens differ only by the position vectors."""
    one = torch.randn(num_images, 1, VARIANTS["tiny"].vision.dim, generator=torch.Generator().manual_seed(1))
    return one.repeat(1, NUM_PATCHES, 1)


def spread(tokens):
    """Standard deviation of an image's tokens in units of their size."""
    return (tokens.std(dim=1, correction=0).mean() / tokens.std()).item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_position_vectors_tokens_depend_on_the_position_of_a_patch(kind):
    model = drawn(kind, places=True)

    assert spread(model.adapter(patches_alike())) > 0.3


@torch.no_grad()
def test_without_position_vectors_a_patch_gives_the_same_token_at_every_position():
    model = drawn("local", places=False)

    assert spread(model.adapter(patches_alike())) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_form_has_no_position_vectors(kind):
    assert not [name for name, _ in drawn(kind, places=False).named_parameters() if "places" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 6, 15])
@torch.no_grad()
def test_an_initial_token_depends_most_on_the_patch_at_its_position(kind, place):
    adapter = drawn(kind, places=True).adapter
    patches = patches_alike()
    before = adapter(patches)
    patches[0, place] = torch.randn(patches.shape[2], generator=torch.Generator().manual_seed(2))

    assert (adapter(patches) - before).norm(dim=2).argmax() == place


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("num_tokens", [3, 8, 16, 40])
@torch.no_grad()
def test_a_compressor_has_its_number_of_tokens_for_any_number_of_patches(kind, num_tokens):
    model = drawn(kind, places=True, num_tokens=num_tokens)

    tokens = model.adapter(patches_alike(2))

    assert tokens.shape == (2, num_tokens, VARIANTS["tiny"].joint.dim)
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize("kind", COMPRESSORS)
@torch.no_grad()
def test_each_initial_query_attends_to_a_different_position(kind):
    adapter = drawn(kind, places=True).adapter
    attention = adapter.cross_attentions[0].attention
    keys = adapter.places(torch.zeros(1, NUM_PATCHES, attention.embed_dim))

    _, weights = attention(adapter.query, keys, keys)

    assert weights[0].argmax(dim=1).tolist() == list(range(NUM_PATCHES))
    assert weights[0].diagonal().min() > 2 / NUM_PATCHES


def test_fewer_queries_than_positions_start_evenly_spaced():
    places = PatchPositions(9, 1)
    with torch.no_grad():
        places.table.weight.copy_(torch.arange(9.0)[:, None])

    assert places.evenly_spaced(3)[:, 0].tolist() == [0, 3, 6]
    assert places.evenly_spaced(18)[:, 0].tolist() == [each // 2 for each in range(18)]
