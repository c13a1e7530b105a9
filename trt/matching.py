"""Checks whether an engine fits the model, the limits and the machine; each mismatch is described by a sentence.

Knows manifests, versions and names of GPUs; reads no device and no file.
"""

from __future__ import annotations

import re
from pathlib import Path

from trt.contract import EngineMismatch
from trt.manifest import Manifest, rebuild_advice

_AMPERE = (8, 0)


def mismatches(
    manifest: Manifest,
    *,
    model_digest: str,
    tensorrt_version: str,
    gpu: str,
    compute_capability: tuple[int, int],
) -> list[str]:
    """Return the reasons why the plans cannot be used for this model on this machine; empty if they can.

    The remedy for each reason is `rebuild_command`.
    """
    found = model_mismatches(manifest, model_digest=model_digest)
    built, options = manifest.built_on, manifest.options
    if built is None:
        return [*found, "the directory holds ONNX graphs only, no plans"]
    if options.version_compatible:
        if not _is_served_by(built.tensorrt_version, tensorrt_version):
            found.append(
                f"the plans were built by TensorRT {built.tensorrt_version} and run on this and later versions of "
                f"the same major version; this machine has {tensorrt_version}"
            )
    elif built.tensorrt_version != tensorrt_version:
        found.append(
            f"the plans run only on TensorRT {built.tensorrt_version}, which built them; "
            f"this machine has {tensorrt_version}"
        )
    here = f"this machine has {gpu} of {_capability(compute_capability)}"
    match options.hardware_compatibility:
        case "none" if (built.gpu, built.compute_capability) != (gpu, compute_capability):
            found.append(f"the plans were built for {built.gpu} of {_capability(built.compute_capability)}; {here}")
        case "same_compute_capability" if built.compute_capability != compute_capability:
            found.append(f"the plans run on GPUs of {_capability(built.compute_capability)}; {here}")
        case "ampere_plus" if compute_capability < _AMPERE:
            found.append(f"the plans run on GPUs of {_capability(_AMPERE)} and later; {here}")
    return found


def model_mismatches(manifest: Manifest, *, model_digest: str) -> list[str]:
    """Return the part of `mismatches` that concerns the model alone, for a runtime without plans."""
    if manifest.model_digest == model_digest:
        return []
    return [f"the engine was built from model {manifest.model_digest}, the checkpoint is {model_digest}"]


def limit_mismatches(manifest: Manifest, *, storage: str, max_pairs: int, max_images: int) -> list[str]:
    """Return the reasons why an engine does not support this storage type or these limits on any machine."""
    options = manifest.options
    found = []
    if options.storage != storage:
        found.append(f"the engine reads {options.storage} tokens, the store holds {storage}")
    for unit, asked, most in (("pairs", max_pairs, options.max_pairs), ("images", max_images, options.max_images)):
        if asked > most:
            found.append(f"the engine takes at most {most} {unit} in one call, the settings ask for {asked}")
    return found


def with_limits(manifest: Manifest, *, storage: str, max_pairs: int, max_images: int) -> Manifest:
    """Return the manifest with this storage type and raised limits, for the command that builds such an engine."""
    options = manifest.options
    wanted = {
        "storage": storage,
        "max_pairs": max(options.max_pairs, max_pairs),
        "max_images": max(options.max_images, max_images),
    }
    return manifest.model_copy(update={"options": options.model_copy(update=wanted)})


def refuse(directory: Path, manifest: Manifest, reasons: list[str]) -> None:
    """Raise `EngineMismatch` with all reasons, if any, and the command that builds the manifest's engine."""
    if reasons:
        raise EngineMismatch(f"{directory} cannot be used: {'; '.join(reasons)}: {rebuild_advice(manifest)}")


def _is_served_by(built: str, here: str) -> bool:
    """Whether a version-compatible plan runs here: the same major version, not older."""
    built_numbers, here_numbers = ([int(number) for number in re.findall(r"\d+", each)] for each in (built, here))
    return built_numbers[0] == here_numbers[0] and built_numbers <= here_numbers


def _capability(numbers: tuple[int, int]) -> str:
    return f"compute capability {numbers[0]}.{numbers[1]}"
