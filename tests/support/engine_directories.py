"""Small engine directories of every kind of encoder, exported once for all pytest-xdist workers: a graph takes seconds.

Between them they have every storage type, every precision, and heads with and without the first stage's score.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress

from edje.config import EdjeConfig
from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from trt.build.assemble import export_engine
from trt.manifest import BuildOptions, write_manifest

MAX_PAIRS, MAX_IMAGES = 48, 12
#: Of a test that is the first to ask, on a machine that has other work: some seconds where it has none.
FIRST_LIMIT_S = 900
SEED = 1


@dataclass(frozen=True)
class Sample:
    """A checkpoint and the engine directory that was exported from it."""

    checkpoint: Path
    engine: Path
    options: BuildOptions


def _options(storage: str, precision: str) -> BuildOptions:
    return BuildOptions(
        storage=storage, precision=precision, max_pairs=MAX_PAIRS, max_images=MAX_IMAGES, length_buckets=(8, 16, 32)
    )


def _small(variant: str, *, num_layers: int, decoder: bool = False) -> EdjeConfig:
    config = VARIANTS[variant]
    joint = replace(config.joint, num_layers=num_layers)
    # The paper's adapter and the decoder once each: tracing takes time by the operator, and they have the most.
    adapter = config.adapter if variant == "tiny" else replace(config.adapter, kind="local")
    if decoder:
        adapter = replace(adapter, kind="decoder", places=True)
    return replace(config, vision=replace(config.vision, num_layers=1), adapter=adapter, joint=joint)


#: By kind of encoder.
KINDS = {
    "full": (_small("tiny", num_layers=2), _options("int8", "fp32")),
    "late": (_small("tiny-late", num_layers=2), _options("int4", "bf16")),
    "minimal": (_small("tiny-minimal", num_layers=1, decoder=True), _options("fp16", "fp16")),
    "maxsim": (_small("tiny-maxsim", num_layers=0), _options("bf16", "fp32")),
}


def sample(tmp_path_factory, kind: str) -> Sample:
    """Return the sample of a kind, made by the first caller. All tests share it, so it must not be changed."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    config, options = KINDS[kind]
    checkpoint, engine = folder / f"checkpoint-{kind}", folder / f"engine-{kind}"
    with (folder / f".{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not engine.exists():
            draft = folder / f".engine-{kind}"
            for begun in (checkpoint, draft):  # left by an interrupted process
                shutil.rmtree(begun, ignore_errors=True)
            write_untrained(config, checkpoint, seed=SEED)
            draft.mkdir()
            manifest = export_engine(load_checkpoint(checkpoint), draft, options, Progress(disable=True))
            write_manifest(draft, manifest)
            draft.rename(engine)
    return Sample(checkpoint, engine, options)


def copy_of(made: Sample, folder: Path) -> Path:
    """Return a copy of an engine directory that a test may damage."""
    return Path(shutil.copytree(made.engine, folder / "engine"))
