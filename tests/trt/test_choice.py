"""The engine that `auto` uses."""

from types import SimpleNamespace

import pytest

from engine_directories import FIRST_LIMIT_S, sample
from small_engines import loaded_engine
from trt.choice import TRIAL_S, fastest_engine
from trt.contract import EngineMismatch


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed:
    """An engine whose calls take a while."""

    def __init__(self, clock, seconds, num_slots=8):
        self.info = SimpleNamespace(max_pairs=8, num_slots=num_slots, image_size=4, max_text_tokens=5)
        self.clock, self.seconds, self.calls = clock, seconds, []

    def encode_queries(self, texts):
        return texts

    def score_pairs(self, queries, pair_query, pair_slot):
        self.calls.append(len(pair_slot))
        self.clock.now += self.seconds

    def encode_images(self, pixels):
        self.calls.append(pixels.shape)
        self.clock.now += self.seconds


def choose(*seconds, **options):
    clock = Clock()
    engines = {name: Timed(clock, each, **options) for name, each in zip(("torch", "onnx"), seconds, strict=False)}
    return fastest_engine(engines, clock), engines, clock.now


@pytest.mark.parametrize(
    ("seconds", "chosen"), [((0.02, 0.01), "onnx"), ((0.01, 0.02), "torch"), ((0.010, 0.0095), "torch")]
)
def test_the_first_engine_is_used_unless_another_is_clearly_faster(seconds, chosen):
    name, engines, took = choose(*seconds)

    assert name == chosen
    assert took < TRIAL_S + 4 * max(seconds)
    assert set(engines["onnx"].calls) == {8}


def test_a_single_engine_needs_no_trial():
    assert choose(1.0)[::2] == ("torch", 0.0)


def test_an_engine_for_images_is_tried_with_images():
    _, engines, _ = choose(0.1, 0.2, num_slots=1)

    assert set(engines["torch"].calls) == {(1, 3, 4, 4)}


def test_auto_without_an_engine_directory_is_torch_with_its_digest(checkpoint):
    assert loaded_engine("auto", checkpoint).info == loaded_engine("torch", checkpoint).info


@pytest.mark.timeout(FIRST_LIMIT_S)
def test_auto_with_an_engine_directory_is_one_of_the_two_with_its_digest(tmp_path_factory):
    made = sample(tmp_path_factory, "full")

    engine = loaded_engine("auto", made.checkpoint, engine_directory=made.engine, num_threads=1)

    directory = {} if engine.info.runtime == "torch" else {"engine_directory": made.engine}
    assert engine.info == loaded_engine(engine.info.runtime, made.checkpoint, **directory).info


def test_auto_with_a_directory_of_another_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(EngineMismatch, match="holds no engine"):
        loaded_engine("auto", checkpoint, engine_directory=tmp_path)
