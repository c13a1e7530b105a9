"""Features: each image is extracted once, by one process, and again only when it has changed."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from edje.data.augmentation import view_of
from edje.data.caption_table import caption_table
from edje.data.concatenated import concatenate
from edje.data.dataset import CaptionedImage, DataError, Dataset, Problems
from edje.data.scenes.dataset import scenes
from edje.features import extraction as module
from edje.features.extraction import Extractor, extract, extractor_of
from edje.features.storage import FeaturesError
from edje.images import ImageError
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_untrained
from edje.model.variants import VARIANTS

SIZE = 8
BATCH = 4


class Pictures:
    """Image i has the value i everywhere; some cannot be decoded."""

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
    """Two tokens with the image's value. Can be stopped at a batch, and can fail for some images."""

    def __init__(self, stops_at=None, fails_for=(), value=float("nan")):
        self.num_batches = 0
        self.seen = []
        self.stops_at = stops_at
        self.fails_for = fails_for
        self.value = value

    def __call__(self, pixels):
        self.num_batches += 1
        if self.num_batches == self.stops_at:
            raise KeyboardInterrupt
        numbers = pixels[:, 0, 0, 0].float()
        self.seen += numbers.int().tolist()
        numbers[[int(number) in self.fails_for for number in numbers]] = self.value
        return torch.stack([numbers, -numbers], 1)[..., None].repeat(1, 1, 3), numbers[:, None].repeat(1, 5)


def dataset_of(num_images, broken=()):
    images = tuple(CaptionedImage(f"img-{number}", ("a caption",)) for number in range(num_images))
    return Dataset("pictures", images, Problems(), f"{num_images} pictures", Pictures(broken))


def extractor(tower, digest="t1"):
    return Extractor(tower, SIZE, "bicubic", digest)


@pytest.fixture
def run(tmp_path):
    def extract_quietly(tower, dataset, **options):
        folder = tmp_path / "features"
        return extract(extractor(tower), dataset, folder, batch_size=BATCH, console=Console(quiet=True), **options)

    return extract_quietly


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_MAX_SHARD_ROWS", 2 * BATCH)


def shards(tmp_path):
    return sorted(path for path in tmp_path.glob("features/*/*") if path.is_dir() and not path.name.startswith("."))


def assert_values(features, numbers):
    numbers = np.asarray(numbers)
    np.testing.assert_array_equal(features.tokens[:], np.stack([numbers, -numbers], 1)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(features.pooled, numbers[:, None].repeat(5, 1))


def test_a_row_belongs_to_the_image_of_its_index(run, small_shards):
    dataset = dataset_of(20)

    features = run(Tower(), dataset)

    assert dataset.source.resample == "bicubic"
    assert features.ids == tuple(f"img-{number}" for number in range(20))
    assert (features.rows == np.arange(20)).all()
    assert_values(features, range(20))
    some = np.array([17, 3, 3, 0])
    np.testing.assert_array_equal(features.tokens[some], features.tokens[:][some])
    assert features.tokens.shape == (20, 2, 3)
    assert len(features.tokens[5:9]) == 4


def test_features_are_stored_in_half_precision(run):
    features = run(Tower(), dataset_of(3))

    assert features.tokens.dtype == features.pooled.dtype == features.tokens[:].dtype == np.float16


def test_stored_features_are_not_extracted_again(run):
    run(Tower(), dataset_of(5))
    again = Tower()

    assert len(run(again, dataset_of(5)).rows) == 5
    assert again.num_batches == 0


def test_images_that_cannot_be_decoded_are_named_and_have_no_row(run):
    tower, dataset = Tower(), dataset_of(10, broken=(0, 6))

    features = run(tower, dataset)

    assert features.rows.tolist() == tower.seen == [1, 2, 3, 4, 5, 7, 8, 9]
    assert features.unreadable == {0: "cut off", 6: "cut off"}
    assert dataset.problems.named("undecodable_image") == ("img-0", "img-6")


def test_undecodable_images_of_stored_features_are_reported_again_and_not_decoded_again(run):
    run(Tower(), dataset_of(10, broken=(6,)))
    dataset = dataset_of(10, broken=(6,))

    run(Tower(), dataset)

    assert dataset.problems.counts == {"undecodable_image": 1}
    assert dataset.source.asked == []


@pytest.mark.parametrize("was_extracted", [False, True])
def test_a_strict_extraction_stops_at_an_undecodable_image(run, was_extracted):
    if was_extracted:
        run(Tower(), dataset_of(10, broken=(6, 8)))

    with pytest.raises(DataError, match=r"image img-6 \(7 of 10\) cannot be decoded \(cut off\)"):
        run(Tower(), dataset_of(10, broken=(6, 8)), strict=True)


def test_a_dataset_without_one_readable_image_is_refused(run):
    with pytest.raises(FeaturesError, match=r"pictures: none of 5 images can be read \(cut off\)"):
        run(Tower(), dataset_of(5, broken=range(5)))


@pytest.mark.parametrize("image", [0, 7])
def test_features_that_are_not_finite_name_their_image(run, image):
    with pytest.raises(FeaturesError, match=rf"img-{image} are not finite"):
        run(Tower(fails_for=(image,)), dataset_of(10))


def test_features_too_large_for_half_precision_are_refused(run):
    with pytest.raises(FeaturesError, match="img-3 are too large for float16"):
        run(Tower(fails_for=(3,), value=1e6), dataset_of(5))


def test_a_stopped_extraction_continues_after_its_last_shard(run, small_shards):
    dataset = dataset_of(22, broken=(1,))
    with pytest.raises(KeyboardInterrupt):
        run(Tower(stops_at=4), dataset)
    rest = Tower()

    features = run(rest, dataset)

    assert rest.seen == list(range(8, 22))  # a shard of two batches was written
    assert features.unreadable == {1: "cut off"}
    assert_values(features, [0, 0, *range(2, 22)])


@pytest.mark.parametrize("name", ["tokens.npy", "pooled.npy", "images.npy", "unreadable.json"])
def test_a_damaged_shard_is_refused_and_its_removal_repairs_the_store(run, tmp_path, small_shards, name):
    run(Tower(), dataset_of(20))
    damaged = shards(tmp_path)[1]
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-10])

    with pytest.raises(FeaturesError, match=f"{damaged} is damaged .* remove this folder to extract it again"):
        run(Tower(), dataset_of(20))

    for path in damaged.iterdir():
        path.unlink()
    damaged.rmdir()
    again = Tower()
    assert_values(run(again, dataset_of(20)), range(20))
    assert 0 < len(again.seen) <= 8


def test_an_unexpected_error_in_decoding_is_raised(run):
    class Broken(Pictures):
        def pixels(self, index, size, resample):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(Tower(), replace(dataset_of(10), source=Broken()))


def test_decoding_stays_close_to_the_tower(run):
    dataset = dataset_of(200)
    ahead = []

    def watching(pixels):
        ahead.append(len(dataset.source.asked) - int(pixels[-1, 0, 0, 0]))
        return Tower()(pixels)

    run(watching, dataset)

    assert max(ahead) <= (module._BATCHES_AHEAD + 1) * BATCH + 1


def test_two_separate_extractions_at_once_do_the_work_once(run):
    tower = Tower()
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(tower, dataset_of(40)))) for _ in range(3)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(tower.seen) == list(range(40))
    assert len(found) == 3
    for features in found:
        assert_values(features, range(40))


def test_connected_processes_each_extract_their_share_and_get_all_features(run):
    barrier = threading.Barrier(3, timeout=60)
    towers, found = [Tower() for _ in range(3)], {}

    def process(rank):
        found[rank] = run(towers[rank], dataset_of(90, broken=(4,)), rank=rank, num_processes=3, wait=barrier.wait)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(number for tower in towers for number in tower.seen) == [n for n in range(90) if n != 4]
    assert min(len(tower.seen) for tower in towers) > 10
    for rank in range(3):
        assert found[rank].unreadable == {4: "cut off"}
        assert found[rank].pooled[:, 0].tolist() == [0 if n == 4 else n for n in range(90)]


# Files: which images are extracted again


@pytest.fixture
def folder(tmp_path):
    """Ten grey images, told apart by their value."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(10):
        write_image(images, number)
    return images


def write_image(folder, number, value=None):
    Image.new("RGB", (8, 8), (number if value is None else value,) * 3).save(folder / f"{number}.png")


def table(folder, numbers=range(10)):
    path = folder.parent / "list.csv"
    path.write_text("image,caption\n" + "".join(f"{number}.png,a caption\n" for number in numbers))
    return caption_table(path, folder)


def seen_by(run, dataset):
    tower = Tower()
    run(tower, dataset)
    return sorted(tower.seen)


def test_a_touched_file_is_not_extracted_again_and_a_changed_one_alone_is(run, folder):
    seen_by(run, table(folder))
    (folder / "3.png").touch()
    write_image(folder, 5, value=105)

    tower = Tower()
    features = run(tower, table(folder))

    assert tower.seen == [105]
    assert features.pooled[:, 0].tolist() == [0, 1, 2, 3, 4, 105, 6, 7, 8, 9]


def test_a_moved_folder_is_not_extracted_again(run, folder):
    seen_by(run, table(folder))

    assert seen_by(run, table(folder.rename(folder.parent / "moved"))) == []


def test_other_images_and_another_order_leave_the_features_of_an_image(run, folder):
    seen_by(run, table(folder, range(6)))

    assert seen_by(run, table(folder, [9, 2, 7, 0])) == [7, 9]


def test_features_of_a_part_serve_every_dataset_that_contains_it(run, folder):
    seen_by(run, table(folder, range(4)))
    part, other = table(folder, range(4)), table(folder, [8, 9])

    joined = concatenate({"a": part, "b": other}, "train")

    assert seen_by(run, joined) == [8, 9]
    assert seen_by(run, concatenate({"b": other, "a": part}, "train")) == []


def test_a_view_is_extracted_once_for_each_image_whatever_else_the_dataset_contains(run, folder):
    run(Tower(), view_of(table(folder, [1, 2, 3]), 2))
    tower = Tower()

    run(tower, view_of(table(folder, [3, 7]), 2))

    assert tower.seen == [7]
    assert seen_by(run, view_of(table(folder, [3, 7]), 3)) == [3, 7]


def test_a_file_that_cannot_be_opened_is_tried_again_and_a_damaged_one_is_not(run, folder):
    dataset = table(folder)
    (folder / "2.png").rename(folder / "gone")
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")

    first = run(Tower(), dataset)
    (folder / "gone").rename(folder / "2.png")
    tower = Tower()
    second = run(tower, dataset)

    assert first.unreadable.keys() == {2, 4}
    assert "cannot be read" in first.unreadable[2]
    assert second.unreadable.keys() == {4}
    assert tower.seen == [2]


def test_drawn_scenes_are_extracted_once_for_any_number_of_groups(run):
    tower = Tower()
    run(tower, scenes("dev", 0, 2))
    num_drawn = len(tower.seen)

    run(tower, scenes("dev", 0, 3))

    assert num_drawn == 8
    assert len(tower.seen) == 12


def test_the_causes_of_unreadable_images_are_stored_as_json(run, tmp_path):
    run(Tower(), dataset_of(3, broken=(1,)))

    [shard] = shards(tmp_path)
    [found] = json.loads((shard / "unreadable.json").read_text())["images"].values()
    assert found == {"cause": "cut off", "is_temporary": False}


# What an extractor depends on

TINY = VARIANTS["tiny"]


def model_of(config, seed=0):
    model = build_edje(config)
    initialise_untrained(model, seed)
    return model.eval()


def test_the_output_of_the_tower_is_stored(tmp_path):
    model, dataset = model_of(TINY), dataset_of(3)

    features = extract(extractor_of(model, TINY), dataset, tmp_path, console=Console(quiet=True))

    pixels = torch.stack([torch.from_numpy(dataset.pixels(number, 64)) for number in range(3)])
    with torch.inference_mode():
        tokens, pooled = model.run_tower(pixels)
    np.testing.assert_allclose(features.tokens[:], tokens, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features.pooled, pooled, rtol=1e-3, atol=1e-3)


def test_a_tower_has_the_same_digest_whatever_follows_it():
    model = model_of(TINY)
    other_adapter = replace(TINY, name="other", adapter=replace(TINY.adapter, num_tokens=8))
    shorter = replace(TINY, preprocess=replace(TINY.preprocess, max_caption_pieces=20))

    digests = {extractor_of(model, config).digest for config in (TINY, other_adapter, shorter)}

    assert len(digests) == 1


def test_another_tower_or_other_preprocessing_has_another_digest():
    bright = replace(TINY, preprocess=replace(TINY.preprocess, mean=(0.4, 0.5, 0.5)))
    smooth = replace(TINY, preprocess=replace(TINY.preprocess, resample="bicubic"))
    nudged = model_of(TINY)
    nudged.vision.norm.bias.data[0] = 1e-7

    digests = [extractor_of(model_of(config), config).digest for config in (TINY, bright, smooth)]
    digests += [extractor_of(model_of(TINY, seed=1), TINY).digest, extractor_of(nudged, TINY).digest]

    assert len(set(digests)) == 5


def test_features_of_another_tower_are_extracted(tmp_path):
    towers = [Tower(), Tower()]
    for number, tower in enumerate(towers):
        extract(extractor(tower, f"t{number}"), dataset_of(3), tmp_path, console=Console(quiet=True))

    assert [tower.seen for tower in towers] == [[0, 1, 2]] * 2
