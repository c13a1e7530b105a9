"""Drawn scenes: captions hold for their scene alone, and no scene is in two splits."""

from __future__ import annotations

import re
from itertools import islice, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edje.data.scenes.dataset as scenes_module
from edje.data.caption_table import caption_table
from edje.data.dataset import DataError
from edje.data.scenes.dataset import draw_groups, holdout, scenes, split_of, write_scenes
from edje.data.scenes.drawing import RGB, draw
from edje.data.scenes.world import (
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    Mention,
    Relation,
    Scene,
    Statement,
    Thing,
    holds,
    word_bag,
)

SIZE = 64

seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(["train", "dev", "test"])
few = settings(max_examples=25, deadline=None)

things = st.builds(
    Thing,
    st.sampled_from(SHAPES),
    st.sampled_from(COLOURS),
    st.sampled_from(PATTERNS),
    st.sampled_from(SIZES),
    st.integers(0, 2),
    st.integers(0, 2),
)

# ---- a reader of captions that shares no code with their writer: words to facts, facts to truth

MEANING = {
    "big": "large", "little": "small", "tiny": "small", "plain": "solid", "spotted": "dotted", "empty": "hollow",
    "stripes": "striped", "dots": "dotted", "spots": "dotted",
}  # fmt: skip
NOUN = re.compile(
    r"\b(?:a|an|the) (?:(large|big|small|little|tiny) )?(?:(solid|plain|striped|dotted|spotted|hollow|empty) )?"
    rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: with (stripes|dots|spots))?"
)
DIRECTION = re.compile(r"(?:to the )?(left|right) of|\b(above|over)\b|\b(below|under|beneath)\b")
#: Sentences with nouns as N, directions as D and without verbs; the relations that each states.
FORMS = {
    "N and N": [],
    "N, N and N": [],
    "N, N, N and N": [],
    "N D N": [(0, 0, 1)],
    "D N N": [(1, 0, 0)],
    "N D N, and N": [(0, 0, 1)],
    "D N N, and N": [(1, 0, 0)],
    "N D N and D N": [(0, 0, 1), (0, 1, 2)],
    "N D N, which D N": [(0, 0, 1), (1, 1, 2)],
    "N D N and N D N": [(0, 0, 1), (2, 1, 3)],
    "N D N while N D N": [(0, 0, 1), (2, 1, 3)],
}
IS_SO = {
    "left": lambda one, other: one.column < other.column,
    "right": lambda one, other: one.column > other.column,
    "above": lambda one, other: one.row < other.row,
    "below": lambda one, other: one.row > other.row,
}


def read(caption):
    """The nouns as sets of words, and the relations as (noun, direction, noun)."""
    nouns = [{MEANING.get(word, word) for word in found.groups() if word} for found in NOUN.finditer(caption)]
    skeleton = NOUN.sub("N", caption)
    directions = []

    def direction(found):
        left_right, above, below = found.groups()
        directions.append(left_right or (above and "above") or (below and "below"))
        return "D"

    skeleton = DIRECTION.sub(direction, skeleton)
    skeleton = re.sub(r"^(there is|we see|a picture of|an image with) ", "", skeleton)
    skeleton = re.sub(r" (is|sits|lies|can be seen)\b", "", skeleton)
    # Two directions in a row relate the same pair.
    runs = [1 + len(found.group(1)) // len(" and D") for found in re.finditer(r"D((?: and D(?= ))*)", skeleton)]
    skeleton = re.sub(r"D(?: and D(?= ))+", "D", skeleton)
    grouped = [[directions.pop(0) for _ in range(run)] for run in runs]
    assert not directions
    return nouns, [(first, name, second) for first, number, second in FORMS[skeleton] for name in grouped[number]]


def is_true(caption, scene):
    nouns, places = read(caption)
    return any(
        all(words <= {t.shape, t.colour, t.pattern, t.size} for words, t in zip(nouns, chosen, strict=True))
        and all(IS_SO[direction](chosen[first], chosen[second]) for first, direction, second in places)
        for chosen in permutations(scene.things, len(nouns))
    )


def first_groups(split, seed, num_groups, **options):
    return list(islice(draw_groups(split, seed, **options), num_groups))


@pytest.mark.parametrize(
    ("caption", "nouns", "places"),
    [
        (
            "a tiny red star with dots is above and to the left of the blue square",
            [{"small", "red", "star", "dotted"}, {"blue", "square"}],
            [(0, "above", 1), (0, "left", 1)],
        ),
        (
            "a red star is over a blue square and right of a black cross",
            [{"red", "star"}, {"blue", "square"}, {"black", "cross"}],
            [(0, "above", 1), (0, "right", 2)],
        ),
        (
            "under a red star lies an empty pink cross",
            [{"red", "star"}, {"hollow", "pink", "cross"}],
            [(1, "below", 0)],
        ),
    ],
)
def test_the_second_reader_understands_english(caption, nouns, places):
    assert read(caption) == (nouns, places)


@given(seeds, splits)
@few
def test_a_caption_holds_for_its_scene_and_for_no_other_in_the_group(seed, split):
    (group,) = first_groups(split, seed, 1)

    for member in group:
        for caption in member.captions:
            found = [is_true(caption.text, other.scene) for other in group]
            assert found == [other is member for other in group], caption.text
            assert found == [holds(caption.statement, other.scene) for other in group]


@given(seeds, splits)
@few
def test_the_scenes_of_a_group_have_the_same_words_and_one_differs_in_cells_alone(seed, split):
    (group,) = first_groups(split, seed, 1)
    base, *confusers = [member.scene for member in group]

    assert {word_bag(scene) for scene in confusers} == {word_bag(base)}
    assert any(kinds_in(scene) == kinds_in(base) for scene in confusers)
    assert len(set(confusers) | {base}) == 4


def kinds_in(scene):
    return sorted((t.shape, t.colour, t.pattern, t.size) for t in scene.things)


@given(seeds, seeds)
@settings(max_examples=5, deadline=None)
def test_no_scene_is_in_two_splits_for_any_seeds(seed, other_seed):
    train, test = (
        {member.scene for group in first_groups(split, each, 12) for member in group}
        for split, each in (("train", seed), ("test", other_seed))
    )

    assert {split_of(scene) for scene in train} == {"train"}
    assert {split_of(scene) for scene in test} == {"test"}
    assert {word_bag(scene) for scene in train}.isdisjoint(word_bag(scene) for scene in test)


def test_no_scene_comes_twice():
    drawn = [member.scene for group in first_groups("train", 1, 100) for member in group]

    assert len(set(drawn)) == len(drawn)


def test_a_repeated_scene_is_left_out(monkeypatch):
    real, drawn = scenes_module.draw_scene, []

    def draw_the_first_again(draws, num_things):
        drawn.append(real(draws, num_things) if len(drawn) > 50 else first)
        return drawn[-1]

    first = first_groups("train", 0, 1)[0][0].scene
    monkeypatch.setattr(scenes_module, "draw_scene", draw_the_first_again)

    (one, *_), (other, *_) = first_groups("train", 0, 2)

    assert one.scene == first != other.scene


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    one, again, other = scenes("train", 5, 3), scenes("train", 5, 3), scenes("train", 6, 3)

    assert one.images == again.images
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert all(np.array_equal(one.pixels(index, SIZE), again.pixels(index, SIZE)) for index in range(12))
    assert {image.captions for image in one.images}.isdisjoint(image.captions for image in other.images)


def test_fewer_groups_are_the_beginning_of_more():
    few_groups, many = scenes("dev", 5, 2), scenes("dev", 5, 4)

    assert many.images[:8] == few_groups.images
    assert np.array_equal(many.pixels(7, SIZE), few_groups.pixels(7, SIZE))
    assert many.fingerprint != few_groups.fingerprint


def test_a_group_is_named_and_an_image_has_five_different_captions():
    dataset = scenes("test", 2, 3)

    assert [image.group for image in dataset.images] == [f"test-2-{number}" for number in range(3) for _ in range(4)]
    assert len({image.image_id for image in dataset.images}) == 12
    assert all(len(set(image.captions)) == 5 for image in dataset.images)


def test_the_language_is_small_lower_case_english():
    captions = [caption for image in scenes("train", 0, 60).images for caption in image.captions]
    words = [re.findall(r"\S+", caption.replace(",", "")) for caption in captions]

    assert len({word for sentence in words for word in sentence}) <= 80
    assert all(re.fullmatch(r"[a-z]+(,? [a-z]+)*", caption) for caption in captions)
    assert 12 <= np.mean([len(sentence) for sentence in words]) <= 18
    assert max(map(len, words)) <= 45
    assert not any(re.search(r"\ba [aeio]|\ban [^aeio]", caption) for caption in captions)


def test_each_synonym_is_used():
    spoken = " ".join(caption for image in scenes("train", 0, 60).images for caption in image.captions)

    missing = [
        words
        for words in (
            "big", "little", "tiny", "plain", "spotted", "empty", "with stripes", "with dots", "with spots",
            "to the left of", "to the right of", "is left of", "above", "over", "below", "under", "beneath", "which",
        )
        if words not in spoken
    ]  # fmt: skip

    assert missing == []


def test_a_perfect_reader_finds_the_picture_among_unseen_ones():
    members = [member for group in first_groups("test", 0, 60) for member in group]
    captions = [caption.statement for member in members for caption in member.captions][::3]

    num_true = [sum(holds(statement, member.scene) for member in members) for statement in captions]

    assert min(num_true) == 1
    assert np.mean([1 / true for true in num_true]) > 0.99


def test_a_holdout_has_exactly_the_number_of_images():
    dataset = holdout(10, seed=1)

    assert len(dataset.images) == 10
    assert dataset.images[:8] == scenes("test", 1, 2).images
    assert dataset.pixels(9, 32).shape == (3, 32, 32)


@pytest.mark.parametrize(("swaps", "confusers"), [((), 1), (("size",), 5)])
def test_more_confusers_than_any_scene_has_are_refused(swaps, confusers):
    with pytest.raises(DataError, match="set fewer confusers or groups, or more swaps"):
        scenes("train", 0, 1, confusers, swaps)


def test_the_kinds_of_confusers_can_be_chosen():
    groups = first_groups("train", 0, 5, confusers=2, swaps=("colour",))

    for base, *confusers in groups:
        for other in confusers:
            without_colour = [
                sorted((t.shape, t.pattern, t.size, t.column, t.row) for t in each.scene.things)
                for each in (base, other)
            ]
            assert without_colour[0] == without_colour[1]


# ---- truth


def scene_of(*cells):
    return Scene(tuple(Thing("circle", COLOURS[n], "solid", "large", *cell) for n, cell in enumerate(cells)))


def statement_of(kind, colour="red", other="orange"):
    return Statement((Mention("circle", colour), Mention("circle", other)), (Relation(kind, 0, 1),))


@pytest.mark.parametrize(
    ("cells", "is_left", "is_above"),
    [
        (((0, 0), (2, 0)), True, False),
        (((0, 0), (0, 1)), False, True),
        (((0, 1), (1, 2)), True, True),
        (((1, 1), (0, 0)), False, False),
    ],
)
def test_a_relation_holds_along_its_own_axis(cells, is_left, is_above):
    scene = scene_of(*cells)

    assert holds(statement_of("left"), scene) is is_left
    assert holds(statement_of("above"), scene) is is_above


def test_a_missing_attribute_fits_any_object_and_a_named_one_must_match():
    scene = scene_of((0, 0), (2, 2))

    assert holds(Statement((Mention("circle", "red", size="large"),)), scene)
    assert not holds(Statement((Mention("circle", "red", size="small"),)), scene)
    assert not holds(Statement((Mention("circle", "green"),)), scene)


def test_two_mentions_are_of_two_things():
    red = Mention("circle", "red")

    assert not holds(Statement((red, red)), scene_of((0, 0), (2, 2)))


# ---- pixels


def centre_of(pixels, colour):
    """Centre of mass of what is nearest to a colour, as (column, row) in units of the side."""
    distances = np.abs(pixels.transpose(1, 2, 0).astype(int) - np.array(RGB[colour])).sum(axis=2)
    rows, columns = np.nonzero(distances < 120)
    return columns.mean() / pixels.shape[2], rows.mean() / pixels.shape[1]


@given(things, things, seeds, st.sampled_from([64, 96, 160]))
@few
def test_an_object_is_drawn_close_to_the_centre_of_its_cell(one, other, seed, size):
    if (one.column, one.row) == (other.column, other.row):
        return
    pair = [
        Thing(t.shape, colour, t.pattern, t.size, t.column, t.row) for t, colour in ((one, "black"), (other, "red"))
    ]

    pixels = draw(Scene(tuple(pair)), size, seed)

    black, red = centre_of(pixels, "black"), centre_of(pixels, "red")
    for axis, cells in ((0, (one.column, other.column)), (1, (one.row, other.row))):
        step = cells[1] - cells[0]
        assert abs(red[axis] - black[axis] - 0.32 * step) < 0.08


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_patterns_shapes_and_sizes_differ_at_64_pixels(shape, size):
    def drawn(shape, pattern, size):
        return draw(Scene((Thing(shape, "blue", pattern, size, 1, 1),)), SIZE, 3).astype(int)

    def num_different(one, other):
        return int((np.abs(one - other).max(axis=0) > 60).sum())

    pictures = [drawn(shape, pattern, size) for pattern in PATTERNS]
    pictures += [drawn(other, "solid", size) for other in SHAPES if other != shape]
    pictures += [drawn(shape, "solid", other) for other in SIZES if other != size]

    different = [num_different(a, b) for n, a in enumerate(pictures) for b in pictures[:n]]
    assert min(different) >= 14


def test_pictures_of_one_scene_differ_by_their_key():
    scene = scene_of((0, 0), (1, 1), (2, 2))

    assert np.array_equal(draw(scene, SIZE, 1, 2), draw(scene, SIZE, 1, 2))
    assert not np.array_equal(draw(scene, SIZE, 1, 2), draw(scene, SIZE, 1, 3))


def test_colours_are_far_from_each_other_and_from_the_paper():
    colours = np.array([*RGB.values(), (234, 234, 234)])

    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2)

    assert distances[~np.eye(len(colours), dtype=bool)].min() >= 100


# ---- export


def test_exported_scenes_are_read_back_with_the_same_captions_and_pixels(tmp_path):
    folder = tmp_path / "pictures"

    table = write_scenes(folder, "test", 6, seed=4, size=SIZE)

    original, read_back = holdout(6, seed=4), caption_table(table, folder, "test", strict=True)
    assert [image.captions for image in read_back.images] == [image.captions for image in original.images]
    assert [image.image_id for image in read_back.images] == [f"{image.image_id}.png" for image in original.images]
    assert all(np.array_equal(read_back.pixels(n, SIZE), original.pixels(n, SIZE)) for n in range(6))


def test_an_export_overwrites_nothing(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")

    with pytest.raises(DataError, match="is not empty: remove it or choose another folder"):
        write_scenes(tmp_path, "test", 2)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
