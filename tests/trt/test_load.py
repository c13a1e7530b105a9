"""`load_engine`: which engine it opens, and its errors."""

import pytest
import torch

from small_engines import CPU, loaded_engine, torch_engine
from trt.contract import EngineMismatch, EngineUnavailable
from trt.runtimes.torch_device import fastest_dtype
from trt.runtimes.torch_engine import TorchEngine


def test_the_torch_engine_computes_in_the_fastest_type_of_the_processor(checkpoint):
    engine = loaded_engine("torch", checkpoint, num_threads=torch.get_num_threads())

    assert isinstance(engine, TorchEngine)
    assert engine.info.engine_digest == torch_engine(checkpoint, "int8", fastest_dtype(CPU)).info.engine_digest


def test_an_engine_that_only_encodes_images_needs_no_slots(checkpoint, pixels):
    engine = loaded_engine("torch", checkpoint, num_slots=0, max_pairs=1, max_images=2)

    engine.warm_up()

    assert engine.encode_images(pixels[:2])[0].shape == (2, 16, 64)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"runtime": "jax"}, "choose auto, torch, tensorrt, onnx or constant"),
        ({"device": "tpu"}, "choose cpu"),
        ({"device": "meta"}, "choose cpu"),
        ({"device": "cuda:99"}, "choose cpu"),
        ({"storage": "fp3"}, "choose one of"),
        ({"runtime": "constant", "storage": "fp3"}, "choose one of"),
    ],
)
def test_a_missing_runtime_device_or_storage_is_an_error_with_a_remedy(checkpoint, changes, remedy):
    with pytest.raises(EngineUnavailable, match=remedy):
        loaded_engine(changes.pop("runtime", "torch"), checkpoint, **changes)


@pytest.mark.parametrize("runtime", ["torch", "constant"])
def test_a_folder_without_a_checkpoint_is_a_mismatch(tmp_path, runtime):
    with pytest.raises(EngineMismatch, match=r"edje\.init"):
        loaded_engine(runtime, tmp_path)
