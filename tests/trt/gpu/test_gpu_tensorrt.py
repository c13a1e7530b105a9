"""A small engine, built by TensorRT on a real GPU: the contract of every engine, and the torch engine's logits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_contract import CAT, DOG, MAX_IMAGES, MAX_PAIRS, NUM_SLOTS, EngineContract, all_scores, fill_slots, numbers
from trt.contract import EngineMismatch
from trt.load import load_engine
from trt.slab.layout import STORAGES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
#: How far bf16 may move a logit, in units of the logits' own spread.
PARITY_TOLERANCE = 0.2


@pytest.fixture(scope="module")
def build(tensorrt_device, checkpoints, tmp_path_factory):
    """Builds the engine of a model once for each storage type and precision, by the command that users type."""
    root, built = tmp_path_factory.mktemp("engines"), {}

    def build_one(variant, storage, precision):
        directory = root / f"{variant}-{storage}-{precision}"
        if directory not in built:
            options = f"--storage {storage} --precision {precision} --max-pairs {MAX_PAIRS} --max-images {MAX_IMAGES}"
            command = [
                sys.executable,
                "-m",
                "trt.build",
                str(checkpoints / variant),
                "--out",
                str(directory),
                "--allow-unfused-attention",
            ]
            done = subprocess.run([*command, *options.split()], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built[directory] = True
        return directory

    return build_one


def load(folder, directory, storage, runtime="tensorrt", **settings):
    sizes = {"num_slots": NUM_SLOTS, "max_pairs": MAX_PAIRS, "max_images": MAX_IMAGES}
    device = "cuda" if runtime == "tensorrt" else "cpu"
    return load_engine(
        runtime,
        folder,
        storage=storage,
        num_threads=None,
        device=device,
        engine_directory=directory,
        **sizes,
        **settings,
    )


@pytest.fixture(params=STORAGES)
def engine(request, build, checkpoint):
    """In float32 and with one size for each length, where the contract's tolerances hold."""
    return load(checkpoint, build("tiny", request.param, "fp32"), request.param, fixed_buckets=True)


class TestTensorRt(EngineContract):
    """Every test of the contract."""


@pytest.mark.parametrize("variant", ["tiny", "tiny-late", "tiny-minimal", "tiny-maxsim"])
def test_logits_are_close_to_those_of_the_torch_engine(build, checkpoints, pixels, variant):
    folder = checkpoints / variant
    reference = load(folder, None, "int8", runtime="torch")
    engine = load(folder, build(variant, "int8", "bf16"), "int8")
    tokens, _ = reference.encode_images(pixels)
    for each in (engine, reference):
        fill_slots(each, range(12), tokens)

    found, expected = (all_scores(each, [DOG, CAT], 12) for each in (engine, reference))

    assert np.abs(found - expected).max() < PARITY_TOLERANCE * expected.std()


def test_every_size_is_captured_and_copies_are_reported(build, checkpoint, pixels):
    engine = load(checkpoint, build("tiny", "int8", "bf16"), "int8")
    engine.warm_up()
    fill_slots(engine, range(3), engine.encode_images(pixels[:3])[0])
    all_scores(engine, [DOG], 3)

    copies = engine.last_copies()

    assert engine.graph_counts().uncaptured == 0
    assert 0 < copies.to_device_s < 1
    assert 0 < copies.to_host_s < 1


def test_with_one_size_a_logit_is_the_same_to_the_last_bit_in_any_company(build, checkpoint, pixels):
    engine = load(checkpoint, build("tiny", "int8", "bf16"), "int8", fixed_buckets=True)
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    together = all_scores(engine, [DOG], 12)[0]
    queries = engine.encode_queries([DOG])

    alone = [engine.score_pairs(queries, numbers(0), numbers(slot))[0] for slot in range(12)]

    np.testing.assert_array_equal(together, alone)


def test_a_truncated_plan_is_refused(build, checkpoint):
    directory = build("tiny", "int8", "bf16")
    plan = directory / "pair.plan"
    content = plan.read_bytes()
    try:
        plan.write_bytes(content[:-100])
        with pytest.raises(EngineMismatch, match=r"python -m trt\.build"):
            load(checkpoint, directory, "int8")
    finally:
        plan.write_bytes(content)
