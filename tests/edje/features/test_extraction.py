"""Features: extracted once, whole or not at all, and under a name that changes with whatever they depend on."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from edje.data.dataset import CaptionedImage, DataError, Dataset, Problems
from edje.features import extraction as module
from edje.features.extraction import Extractor, extract, extractor_of, features_key
from edje.features.storage import FeaturesError, open_features
from edje.images import ImageError
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_untrained
from edje.model.variants import VARIANTS

SIZE = 8
BATCH = 4


class Pictures:
    """Image i is the number i all over; some are broken."""

    def __init__(self, broken=()):
        self.broken = broken
        self.asked = []

    def pixels(self, index, size, resample):
        self.asked.append(index)
        self.resample = resample
        if index in self.broken:
            raise ImageError("image_broken", "cut off")
        return np.full((3, size, size), index, np.uint8)


class Tower:
    """Two tokens that say which image they are of; it may die at a batch, or blow up at an image."""

    def __init__(self, dies_at=None, blows_up_at=(), value=float("nan")):
        self.num_batches = 0
        self.seen = []
        self.dies_at = dies_at
        self.blows_up_at = blows_up_at
        self.value = value

    def __call__(self, pixels):
        self.num_batches += 1
        if self.num_batches == self.dies_at:
            raise KeyboardInterrupt
        numbers = pixels[:, 0, 0, 0].float()
        self.seen += numbers.int().tolist()
        numbers[[int(number) in self.blows_up_at for number in numbers]] = self.value
        return torch.stack([numbers, -numbers], 1)[..., None].repeat(1, 1, 3), numbers[:, None].repeat(1, 5)


def dataset_of(num_images, broken=()):
    images = tuple(CaptionedImage(f"img-{number}", ("a caption",)) for number in range(num_images))
    return Dataset("pictures", images, Problems(), f"{num_images} pictures", Pictures(broken))


def extractor(tower, digest="t1"):
    return Extractor(tower, SIZE, "bicubic", digest)


@pytest.fixture
def run(tmp_path):
    def extract_quietly(tower, dataset, **options):
        return extract(extractor(tower), dataset, tmp_path, batch_size=BATCH, console=Console(quiet=True), **options)

    return extract_quietly


def test_a_row_belongs_to_the_image_of_its_number(run):
    dataset = dataset_of(10)

    features = run(Tower(), dataset)

    numbers = np.arange(10)
    assert dataset.source.resample == "bicubic"
    assert features.ids == tuple(f"img-{number}" for number in numbers)
    assert (features.rows == numbers).all()
    np.testing.assert_array_equal(features.tokens, np.stack([numbers, -numbers], 1)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(features.pooled, numbers[:, None].repeat(5, 1))


def test_features_are_mapped_from_the_disk_in_half_precision(run):
    features = run(Tower(), dataset_of(3))

    assert isinstance(features.tokens, np.memmap)
    assert features.tokens.dtype == features.pooled.dtype == np.float16
    with pytest.raises(ValueError, match="read-only"):
        features.tokens[0] = 1


def test_what_is_there_is_not_extracted_again(run):
    run(Tower(), dataset_of(5))
    again = Tower()

    assert len(run(again, dataset_of(5)).rows) == 5
    assert again.num_batches == 0


def test_images_that_do_not_decode_are_named_and_have_no_row(run):
    tower, dataset = Tower(), dataset_of(10, broken=(0, 6))

    features = run(tower, dataset)

    assert features.rows.tolist() == tower.seen == [1, 2, 3, 4, 5, 7, 8, 9]
    assert features.unreadable == {0: "cut off", 6: "cut off"}
    assert dataset.problems.named("undecodable_image") == ("img-0", "img-6")


def test_features_from_the_disk_tell_of_their_broken_images_again(run):
    run(Tower(), dataset_of(10, broken=(6,)))
    dataset = dataset_of(10, broken=(6,))

    run(Tower(), dataset)

    assert dataset.problems.counts == {"undecodable_image": 1}


@pytest.mark.parametrize("was_extracted", [False, True])
def test_a_strict_extraction_stops_at_the_first_broken_image(run, was_extracted):
    if was_extracted:
        run(Tower(), dataset_of(10, broken=(6, 8)))

    with pytest.raises(DataError, match=r"img-6 is image 7 of 10 and does not decode \(cut off\)"):
        run(Tower(), dataset_of(10, broken=(6, 8)), strict=True)


def test_a_dataset_without_one_readable_image_is_refused(run):
    with pytest.raises(FeaturesError, match="none of 5 images"):
        run(Tower(), dataset_of(5, broken=range(5)))


@pytest.mark.parametrize("image", [0, 7])
def test_features_that_are_not_finite_name_their_image(run, image):
    with pytest.raises(FeaturesError, match=rf"img-{image} is not finite"):
        run(Tower(blows_up_at=(image,)), dataset_of(10))


def test_features_too_large_for_half_precision_ask_for_single(run):
    with pytest.raises(FeaturesError, match="too large for float16: store float32"):
        run(Tower(blows_up_at=(3,), value=1e6), dataset_of(5))

    assert run(Tower(blows_up_at=(3,), value=1e6), dataset_of(5), dtype="float32").pooled[3, 0] == 1e6


def test_a_killed_extraction_is_taken_for_nothing_and_gone_on_with(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCHES_PER_SAVE", 2)
    dataset = dataset_of(22, broken=(1,))
    with pytest.raises(KeyboardInterrupt):
        run(Tower(dies_at=4), dataset)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    rest = Tower()

    features = run(rest, dataset)

    assert rest.seen == list(range(8, 22))  # two batches of four were saved
    assert features.unreadable == {1: "cut off"}
    np.testing.assert_array_equal(features.pooled[features.rows, 0], features.rows)


@pytest.mark.parametrize("name", ["tokens.npy", "pooled.npy", "progress.json"])
def test_a_draft_that_is_not_whole_is_begun_anew(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "_BATCHES_PER_SAVE", 1)
    with pytest.raises(KeyboardInterrupt):
        run(Tower(dies_at=3), dataset_of(12))
    (path,) = tmp_path.glob(f".*/{name}")
    path.write_bytes(path.read_bytes()[:-30])
    tower = Tower()

    features = run(tower, dataset_of(12))

    assert tower.seen == list(range(12))
    np.testing.assert_array_equal(features.pooled[:, 0], np.arange(12))


@pytest.mark.parametrize("name", ["tokens.npy", "pooled.npy", "index.json"])
def test_finished_features_that_were_cut_off_are_refused(run, tmp_path, name):
    features = run(Tower(), dataset_of(12))
    path = tmp_path / features.key / name
    path.write_bytes(path.read_bytes()[:-30])

    with pytest.raises(FeaturesError, match="remove it to extract anew"):
        open_features(tmp_path / features.key)


def test_features_of_another_number_of_images_are_refused(run, tmp_path):
    features = run(Tower(), dataset_of(3))
    np.save(tmp_path / features.key / "pooled.npy", np.zeros((2, 5), np.float16))

    with pytest.raises(FeaturesError, match="other numbers of rows"):
        open_features(tmp_path / features.key)


def test_an_error_in_decoding_that_is_nobodys_picture_comes_out(run):
    class Gone(Pictures):
        def pixels(self, index, size, resample):
            raise PermissionError("the folder cannot be read")

    with pytest.raises(PermissionError, match="folder"):
        run(Tower(), replace(dataset_of(10), source=Gone()))


def test_decoding_stays_near_the_tower(run):
    dataset = dataset_of(200)
    ahead = []

    def watching(pixels):
        ahead.append(len(dataset.source.asked) - int(pixels[-1, 0, 0, 0]))
        return Tower()(pixels)

    run(watching, dataset)

    assert max(ahead) <= (module._BATCHES_AHEAD + 1) * BATCH + 1


def test_of_two_extractions_at_once_one_works(run):
    tower = Tower()
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(tower, dataset_of(40)))) for _ in range(3)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(tower.seen) == list(range(40))
    assert len(found) == 3
    assert len({features.key for features in found}) == 1


# What the key depends on

TINY = VARIANTS["tiny"]


def model_of(config, seed=0):
    model = build_edje(config)
    initialise_untrained(model, seed)
    return model.eval()


def test_the_towers_own_output_is_what_is_stored(tmp_path):
    model, dataset = model_of(TINY), dataset_of(3)

    features = extract(extractor_of(model, TINY), dataset, tmp_path, dtype="float32", console=Console(quiet=True))

    pixels = torch.stack([torch.from_numpy(dataset.pixels(number, 64)) for number in range(3)])
    with torch.inference_mode():
        tokens, pooled = model.run_tower(pixels)
    np.testing.assert_allclose(features.tokens, tokens, atol=1e-6)
    np.testing.assert_allclose(features.pooled, pooled, atol=1e-6)


def test_the_same_tower_has_the_same_digest_whatever_follows_it():
    model = model_of(TINY)
    other_adapter = replace(TINY, name="other", adapter=replace(TINY.adapter, num_tokens=8))
    shorter = replace(TINY, preprocess=replace(TINY.preprocess, max_caption_pieces=20))

    digests = {extractor_of(model, config).digest for config in (TINY, other_adapter, shorter)}

    assert len(digests) == 1


def test_another_tower_or_other_pixels_have_another_digest():
    bright = replace(TINY, preprocess=replace(TINY.preprocess, mean=(0.4, 0.5, 0.5)))
    smooth = replace(TINY, preprocess=replace(TINY.preprocess, resample="bicubic"))
    nudged = model_of(TINY)
    nudged.vision.norm.bias.data[0] = 1e-7

    digests = [extractor_of(model_of(config), config).digest for config in (TINY, bright, smooth)]
    digests += [extractor_of(model_of(TINY, seed=1), TINY).digest, extractor_of(nudged, TINY).digest]

    assert len(set(digests)) == 5


def test_the_key_depends_on_tower_images_and_stored_type():
    few, many = dataset_of(3), dataset_of(4)

    keys = {
        features_key(extractor(None, digest), dataset, dtype)
        for digest in ("t1", "t2")
        for dataset in (few, many)
        for dtype in ("float16", "float32")
    }

    assert len(keys) == 8
