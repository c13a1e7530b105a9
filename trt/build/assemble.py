"""Writes an engine into a directory: graphs, plans if a plan compiler is given, parity reports, and the manifest last.

Knows no command line and no TensorRT, only the `PlanCompiler` protocol.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress

from edje.config import canonical_json
from edje.model.weights import Checkpoint
from trt.check.pairs import ParityPairs
from trt.check.reporting import report_on, scored, torch_reference
from trt.contract import Engine
from trt.export.onnx_export import OPSET, export_graph
from trt.export.operators import check_operators
from trt.graphs import GRAPH_NAMES
from trt.manifest import BuildOptions, GraphFiles, Manifest, ParityReport, digest_file, write_manifest
from trt.parity import ParityFailed, Thresholds, shortfalls
from trt.profiles import profiles_of
from trt.runtimes.onnx_engine import OnnxEngine

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


class PlanCompiler(Protocol):
    """Builds the plans of a directory's graphs."""

    def build(self, directory: Path, manifest: Manifest, bars: Progress) -> Manifest:
        """Write the plans and return the manifest with the plans added."""
        ...

    def load(self, directory: Path, manifest: Manifest, num_slots: int) -> Engine:
        """Return the engine that runs these plans."""
        ...


def assemble(
    checkpoint: Checkpoint,
    directory: Path,
    options: BuildOptions,
    pairs: ParityPairs,
    thresholds: Thresholds,
    compiler: PlanCompiler | None,
    bars: Progress,
) -> Manifest:
    """Write an engine into an empty directory; without a compiler the engine has graphs only.

    Raises `EngineError`: `ParityFailed` below a threshold, `ExportFailed`, `OperatorUnsupported`, and the errors of the
    compiler. After an error the directory has no manifest, so it cannot be loaded.
    """
    reference = scored(torch_reference(checkpoint, options.storage, len(pairs.pixels)), pairs, bars)
    manifest = export_engine(checkpoint, directory, options, bars)
    engine: Engine = OnnxEngine(
        directory,
        manifest,
        num_slots=len(pairs.pixels),
        max_pairs=options.max_pairs,
        max_images=options.max_images,
        num_threads=torch.get_num_threads(),
    )
    reports = [report_on(engine, reference, pairs, thresholds, bars)]
    require_agreement(reports[0])  # before minutes are spent on plans of a wrong graph
    if compiler is not None:
        manifest = compiler.build(directory, manifest, bars)
        engine = compiler.load(directory, manifest, len(pairs.pixels))
        reports.append(report_on(engine, reference, pairs, thresholds, bars))
        require_agreement(reports[1])
    manifest = manifest.model_copy(update={"parity": tuple(reports)})
    write_manifest(directory, manifest)
    return manifest


def require_agreement(report: ParityReport, reference: str = "the torch engine in float32") -> None:
    """Raise `ParityFailed` if a threshold is missed; the message names each one and the queries to look at."""
    missed = shortfalls(report.agreement, report.thresholds)
    if missed:
        raise ParityFailed(
            f"the {report.runtime} engine does not agree with {reference} on {report.pairs_of}: {'; '.join(missed)}"
        )


def export_engine(checkpoint: Checkpoint, directory: Path, options: BuildOptions, bars: Progress) -> Manifest:
    """Write the graphs and return their manifest, without plans and parity; the manifest is not written."""
    profiles = profiles_of(
        max_text_tokens=checkpoint.config.preprocess.max_text_tokens,
        length_buckets=options.length_buckets,
        max_pairs=options.max_pairs,
        max_queries=options.max_pairs,  # each pair may have a different query
        max_images=options.max_images,
    )
    files = {}
    for name in bars.track(GRAPH_NAMES, description="ONNX graphs"):
        path = export_graph(name, checkpoint, directory, storage=options.storage, precision=options.precision)
        check_operators(path)
        weights = path.with_name(f"{path.name}.data")
        files[name] = GraphFiles(
            onnx=digest_file(path),
            weights=digest_file(weights) if weights.exists() else None,
            profiles=profiles[name],
        )
    return Manifest(
        model_digest=checkpoint.digest,
        model=json.loads(canonical_json(checkpoint.config)),
        options=options,
        opset=OPSET,
        graphs=files,
        versions={package: version(package) for package in _PACKAGES},
    )
