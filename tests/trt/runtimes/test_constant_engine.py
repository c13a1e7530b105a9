"""The constant engine."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine_contract import CAT, DOG, all_scores
from small_engines import constant_engine
from trt.runtimes.constant_engine import ConstantEngine


def test_it_sleeps_for_each_image_and_pair(checkpoint, pixels, monkeypatch):
    slept = []
    monkeypatch.setattr("trt.runtimes.constant_engine.time.sleep", slept.append)
    engine = constant_engine(checkpoint, "int8", ms_per_item=2.0)

    engine.encode_images(pixels[:3])
    all_scores(engine, [DOG, CAT], 5)

    assert isinstance(engine, ConstantEngine)
    assert slept == pytest.approx([0.006, 0.020])


def test_it_does_not_import_torch(checkpoint):
    script = f"""
import sys, pathlib
from trt.load import load_engine
load_engine("constant", pathlib.Path({str(checkpoint)!r}), storage="int8", num_slots=1, max_pairs=1, max_images=1,
            num_threads=None, device="cpu")
sys.exit('torch' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[3]).returncode == 0
