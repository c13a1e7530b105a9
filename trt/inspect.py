"""`python -m trt.inspect DIR`: prints an engine's digests, options, profiles, parity reports and layers.

The exit status is 0, or 1 with a message for a directory without an engine or with files that differ from the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trt.check.plan_layers import LayersUnreadable, attention_in, read_layers
from trt.contract import EngineMismatch
from trt.manifest import GraphFiles, Manifest, check_files, read_manifest, rebuild_command


def show(directory: Path, manifest: Manifest, console: Console) -> None:
    """Print the content of the manifest, and the layers if the inspector's file exists.

    The console must not interpret markup, because names come from files. Raises `EngineMismatch` for an unknown model.
    """
    console.print(str(directory), style="bold")
    for heading, table in (
        ("engine", _facts(manifest)),
        ("profiles", _profiles(manifest)),
        ("parity with torch in float32", _parity(manifest)),
        ("layers", _layers(directory, manifest)),
    ):
        if table.row_count:
            console.print(f"\n{heading}")
            console.print(table)
    console.print(f"\nrebuild with: {rebuild_command(manifest)}", soft_wrap=True)


def plain_console() -> Console:
    """Return a console on standard output without markup."""
    return Console(highlight=False, markup=False)


def _facts(manifest: Manifest) -> Table:
    options, built = manifest.options, manifest.built_on
    table = Table(show_header=False)
    facts = {
        **{f"engine digest, {name}": digest for name, digest in manifest.engine_digests().items()},
        "model": f"{manifest.config.name}, {manifest.model_digest}",
        "storage, precision": f"{options.storage}, {options.precision}",
        "limits of one call": f"{options.max_pairs} pairs, {options.max_images} images",
        "plans": "none: ONNX graphs only" if built is None else _built(manifest),
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    for name, value in facts.items():
        table.add_row(name, value)
    for name, part in manifest.graphs.items():
        table.add_row(f"{name} graph", ", ".join(_sizes(part)))
    return table


def _built(manifest: Manifest) -> str:
    options, built = manifest.options, manifest.built_on
    assert built is not None  # the caller has checked it
    major, minor = built.compute_capability
    more = [
        *(["later TensorRTs of its major version"] if options.version_compatible else []),
        *([f"GPUs: {options.hardware_compatibility}"] if options.hardware_compatibility != "none" else []),
    ]
    return f"TensorRT {built.tensorrt_version}, {built.gpu} (compute capability {major}.{minor})" + "".join(
        f"; {each}" for each in more
    )


def _sizes(part: GraphFiles) -> Iterator[str]:
    for file in (part.onnx, part.weights, part.plan):
        if file is not None:
            yield f"{file.name} {file.num_bytes / 1e6:,.1f} MB"


def _profiles(manifest: Manifest) -> Table:
    table = Table("graph", "profile", "accepts", "tuned for")
    for name, part in manifest.graphs.items():
        for number, profile in enumerate(part.profiles):
            tuned = ", ".join(f"{size} {each.replace('_', ' ')}" for each, size in profile.sizes("opt").items())
            table.add_row(name, str(number), profile.name, tuned)
    return table


def _parity(manifest: Manifest) -> Table:
    table = Table("runtime", "measure", "measured", "required")
    for report in manifest.parity:
        found, asked = report.agreement, report.thresholds
        pairs = f"{found.num_queries} x {found.num_candidates} {report.pairs_of}"
        table.add_row(report.runtime, "pairs", pairs, "")
        table.add_row("", "same best candidate", f"{found.top1:.4f}", f"at least {asked.top1}")
        table.add_row("", "Kendall's tau, mean", f"{found.tau:.4f}", f"at least {asked.tau}")
        table.add_row("", "Kendall's tau, lowest", f"{found.tau_lowest:.4f}, query {found.tau_lowest_at}", "")
        error = f"{found.max_error:.6f} of the logits' standard deviation ({found.logit_spread:.3f})"
        table.add_row("", "largest error of a logit", error, f"at most {asked.max_error}")
    return table


def _layers(directory: Path, manifest: Manifest) -> Table:
    table = Table("graph", "layers", "attention")
    for name, part in manifest.graphs.items():
        if part.layers is not None:
            try:
                layers = read_layers(directory / part.layers)
            except LayersUnreadable as error:
                table.add_row(name, "unknown", str(error))
                continue
            table.add_row(name, str(len(layers)), attention_in(layers).summary)
    return table


def main(
    directory: Annotated[Path, typer.Argument(help="Engine directory written by `python -m trt.build`.")],
) -> None:
    """Compare the files of an engine with its manifest, and describe the engine."""
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest, plans=False)
        check_files(directory, manifest, plans=True)
        show(directory, manifest, plain_console())
    except EngineMismatch as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
