"""`python -m trt.build CHECKPOINT --out DIR`: a checkpoint to ONNX, plans, a parity report, an engine directory.

The directory is written completely or not at all. The exit status is 0 on success; 1 after an error, which leaves an
earlier engine unchanged and is explained on standard error; and 2 for invalid arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from edje.checkpoint import CONFIG_FILE, GRAPH_FILE, TOKENIZER_FILE, WEIGHTS_FILE, CheckpointError
from edje.imports.sources import SourceError, find_source
from edje.model.weights import load_checkpoint
from edje.optional import PackageMissing
from edje.progress import progress_bars
from edje.text import Tokenizer
from protocols.validation import first_problem
from trt.build.assemble import PlanCompiler, assemble
from trt.build.draft_directory import DirectoryExists, draft_of, refuse_to_overwrite
from trt.check.pairs import parity_pairs
from trt.contract import EngineError, EngineUnavailable
from trt.graphs import Precision
from trt.inspect import plain_console, show
from trt.manifest import MANIFEST_FILE, BuildOptions, HardwareCompatibility
from trt.parity import THRESHOLDS, Thresholds

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
_CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, GRAPH_FILE)
_DEFAULTS = BuildOptions()


def main(
    checkpoint: Annotated[str, typer.Argument(help="Folder of the model, or hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option(help="Directory to write the engine to.")],
    storage: Annotated[str, typer.Option(help="How the store holds visual tokens: fp16, bf16, int8, int4.")] = (
        _DEFAULTS.storage
    ),
    precision: Annotated[Precision, typer.Option(help="Number type of the layers.")] = _DEFAULTS.precision,
    max_pairs: Annotated[int, typer.Option(help="Pairs in one call.")] = _DEFAULTS.max_pairs,
    max_images: Annotated[int, typer.Option(help="Images in one call.")] = _DEFAULTS.max_images,
    length_buckets: Annotated[str, typer.Option(help="Longest text of each length bucket, in tokens.")] = ",".join(
        map(str, _DEFAULTS.length_buckets)
    ),
    optimization_level: Annotated[int, typer.Option(help="How long TensorRT searches for fast kernels: 0 to 5.")] = (
        _DEFAULTS.optimization_level
    ),
    workspace_gb: Annotated[float, typer.Option(help="Device memory a kernel may ask for, GiB.")] = (
        _DEFAULTS.workspace_gb
    ),
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="The plans also run on later TensorRTs of this major version.")
    ] = False,
    hardware_compatibility: Annotated[
        HardwareCompatibility, typer.Option(help="The plans also run on other GPUs, more slowly.")
    ] = "none",
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings, read if it exists and written: faster rebuilds.")
    ] = None,
    error_on_timing_cache_miss: Annotated[
        bool,
        typer.Option(
            "--error-on-timing-cache-miss",
            help="Fail if a kernel has no stored timing; the kernels are then the same as before.",
        ),
    ] = False,
    allow_unfused_attention: Annotated[
        bool,
        typer.Option("--allow-unfused-attention", help="Also accept plans that compute attention in several kernels."),
    ] = False,
    device: Annotated[str, typer.Option(help="GPU to build on and for: cuda or cuda:N.")] = "cuda",
    onnx_only: Annotated[
        bool, typer.Option("--onnx-only", help="Export and compare the graphs, build no plans.")
    ] = False,
    verify_top1: Annotated[
        float | None, typer.Option(help="Lowest allowed share of queries with the same best image.")
    ] = None,
    verify_tau: Annotated[float | None, typer.Option(help="Lowest allowed mean of Kendall's tau.")] = None,
    verify_max_error: Annotated[
        float | None, typer.Option(help="Largest allowed error of a logit, in standard deviations of the logits.")
    ] = None,
    verify_texts: Annotated[int, typer.Option(min=1, help="Number of texts in the comparison.")] = 48,
    verify_num_images: Annotated[
        int, typer.Option(min=2, help="Number of images in the comparison, each paired with every text.")
    ] = 24,
    verify_images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Photographs for the comparison, optionally with captions.txt; default: scenes or random images.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing engine.")] = False,
) -> None:
    """Build an engine directory. The default thresholds depend on the precision."""
    if error_on_timing_cache_miss and timing_cache is None:
        raise typer.BadParameter("--error-on-timing-cache-miss needs --timing-cache")
    options = _checked(
        BuildOptions,
        storage=storage,
        precision=precision,
        max_pairs=max_pairs,
        max_images=max_images,
        length_buckets=length_buckets.split(","),
        optimization_level=optimization_level,
        workspace_gb=workspace_gb,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
    )
    asked = {"top1": verify_top1, "tau": verify_tau, "max_error": verify_max_error}
    given = {name: number for name, number in asked.items() if number is not None}
    thresholds = _checked(Thresholds, **(THRESHOLDS[precision].model_dump() | given))
    try:
        refuse_to_overwrite(out, MANIFEST_FILE, replace=force)  # before minutes of work
        compiler = (
            None
            if onnx_only
            else _compiler(options, device, timing_cache, error_on_timing_cache_miss, allow_unfused_attention)
        )
        folder = find_source(checkpoint, _CHECKPOINT_FILES)
        loaded = load_checkpoint(folder)
        pairs = parity_pairs(loaded.config, Tokenizer.load(folder), verify_texts, verify_num_images, verify_images)
        with draft_of(out, MANIFEST_FILE, replace=force) as draft, progress_bars(remarks, transient=True) as bars:
            manifest = assemble(loaded, draft, options, pairs, thresholds, compiler, bars)
    except (CheckpointError, DirectoryExists, EngineError, PackageMissing, SourceError) as error:
        _end(str(error))
    except OSError as error:
        _end(f"{out} cannot be written: {error}")
    show(out, manifest, plain_console())


def _compiler(
    options: BuildOptions, device: str, timing_cache: Path | None, error_on_cache_miss: bool, allow_unfused: bool
) -> PlanCompiler:
    try:
        from trt.build.tensorrt_compiler import TensorRtCompiler
    except ImportError as error:
        raise EngineUnavailable(
            f"plans need TensorRT and pycuda, which cannot be imported ({error}): on a machine with an NVIDIA GPU "
            "`pip install 'edje-rerank[gpu]'`; elsewhere give --onnx-only and build there from the same checkpoint"
        ) from error
    return TensorRtCompiler(
        options,
        device=device,
        timing_cache=timing_cache,
        error_on_cache_miss=error_on_cache_miss,
        allow_unfused_attention=allow_unfused,
    )


def _checked(model: type[Any], **fields: object) -> Any:
    """Return the model of these fields. Raises `typer.BadParameter` with the name of an invalid option."""
    try:
        return model(**fields)
    except ValidationError as error:
        raise typer.BadParameter(first_problem(error)) from error


def _end(sentence: str) -> NoReturn:
    remarks.print(sentence)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
