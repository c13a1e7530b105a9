"""The manifest of an engine directory, which is read before any other file of it.

    manifest.json             the manifest
    image.onnx ...            the three graphs, with image.onnx.data if the weights are in a second file
    image.plan ...            TensorRT's plans; absent after a build with --onnx-only
    image.layers.json ...     the layers of the plans, from TensorRT's inspector

Knows files, digests and versions; imports no torch, no ONNX and no TensorRT. Every fault of a directory raises an
`EngineMismatch` whose message ends with what to do.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edje.config import EdjeConfig, parse_config
from protocols.validation import first_problem
from trt.contract import EngineMismatch
from trt.graphs import DIMENSIONS, GraphName, Precision
from trt.identity import engine_digest
from trt.parity import Agreement, Thresholds
from trt.profiles import Profile
from trt.text_lengths import TEXT_LENGTHS

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
#: A manifest has a few kilobytes; a thousand times as much is an error.
_MAX_MANIFEST_BYTES = 10_000_000

HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: A plain file name, so that no path can point outside the engine directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileDigest(_Part):
    """Name, SHA-256 and size of a file in the directory."""

    name: FileName
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class GraphFiles(_Part):
    """The files of one graph, and the profiles of its plan in the plan's order."""

    onnx: FileDigest
    weights: FileDigest | None = None  # if the graph is too large for one file
    plan: FileDigest | None = None
    layers: FileName | None = None
    profiles: tuple[Profile, ...]


class BuiltOn(_Part):
    """TensorRT version and GPU of the build; a plan runs only where they match."""

    tensorrt_version: str
    gpu: str
    compute_capability: tuple[int, int]


class BuildOptions(_Part):
    """The options of `python -m trt.build` that shape an engine, with their defaults."""

    storage: str = "int8"
    precision: Precision = "bf16"
    max_pairs: Annotated[int, Field(ge=1)] = 512
    max_images: Annotated[int, Field(ge=1)] = 16
    length_buckets: tuple[Annotated[int, Field(ge=1)], ...] = TEXT_LENGTHS
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    workspace_gb: Annotated[float, Field(gt=0)] = 4.0
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"

    def as_arguments(self) -> list[str]:
        """Return the command-line arguments for these options; defaults are left out."""
        arguments: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value == field.default:
                continue
            arguments.append(f"--{name.replace('_', '-')}")
            if not isinstance(value, bool):
                arguments.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return arguments


class ParityReport(_Part):
    """Agreement of the engine with the torch reference at build time."""

    runtime: str  # the runtime that was compared with torch: "onnx" or "tensorrt"
    pairs_of: str  # kind of the pairs, in words
    thresholds: Thresholds
    agreement: Agreement


class Manifest(_Part):
    """One engine: its model, options, files, where its plans were built, and its parity reports."""

    format_version: Literal[1] = FORMAT_VERSION
    model_digest: str
    model: dict[str, Any]  # the checkpoint's configuration
    options: BuildOptions
    opset: int
    graphs: dict[GraphName, GraphFiles]
    built_on: BuiltOn | None = None  # None: there are no plans
    parity: tuple[ParityReport, ...] = ()  # one for each runtime that was compared
    versions: dict[str, str]  # of the packages that wrote it

    @property
    def config(self) -> EdjeConfig:
        """The model's configuration. Raises `EngineMismatch` if this program does not know the configuration."""
        try:
            return parse_config(json.dumps(self.model))
        except ValueError as error:
            raise EngineMismatch(
                f"the engine was built from a model that this program does not know: {rebuild_advice(self)}"
            ) from error

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Check that there are all three graphs, plans for all or none, and profiles with the graphs' dimensions."""
        if self.graphs.keys() != DIMENSIONS.keys():
            raise ValueError(f"an engine has the graphs {', '.join(DIMENSIONS)}, not {', '.join(self.graphs)}")
        if {part.plan is not None for part in self.graphs.values()} != {self.built_on is not None}:
            raise ValueError("all graphs have plans together with built_on, or none has")
        for name, part in self.graphs.items():
            if not part.profiles or any(each.ranges.keys() != set(DIMENSIONS[name]) for each in part.profiles):
                raise ValueError(f"the profiles of the {name} graph must have ranges for {', '.join(DIMENSIONS[name])}")
        return self

    def engine_digest(self, runtime: Literal["onnx", "tensorrt"], *, fixed_buckets: bool = False) -> str:
        """Return the digest of everything that can change a score in a runtime; every reply carries it.

        It depends on the manifest alone, so `python -m trt.inspect` prints the same digest on every machine.
        """
        details = [self.options.storage, self.options.precision]
        files = [each for _, part in sorted(self.graphs.items()) for each in (part.onnx, part.weights)]
        if runtime == "onnx":
            details.append(self.versions.get("onnxruntime", ""))
        elif self.built_on is not None:
            details += [self.built_on.tensorrt_version, self.built_on.gpu]
            files += [part.plan for _, part in sorted(self.graphs.items())]
        if fixed_buckets:  # the sizes decide the kernels, and kernels round differently
            details.append("fixed buckets")
        return engine_digest(self.model_digest, runtime, *details, *(each.sha256 for each in files if each is not None))

    def engine_digests(self) -> dict[str, str]:
        """Return the digests by runtime and mode."""
        digests = {"onnx": self.engine_digest("onnx")}
        if self.built_on is not None:
            digests["tensorrt"] = self.engine_digest("tensorrt")
            digests["tensorrt, fixed buckets"] = self.engine_digest("tensorrt", fixed_buckets=True)
        return digests


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an engine directory, without checking the other files (see `check_files`)."""
    path = directory / MANIFEST_FILE
    remedy = "build one with `python -m trt.build CHECKPOINT --out DIR`"
    if not path.is_file():
        raise EngineMismatch(f"{directory} holds no engine ({MANIFEST_FILE} is missing): {remedy}")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise EngineMismatch(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_MANIFEST_BYTES:
        raise EngineMismatch(f"{path} is larger than any manifest: {remedy}")
    try:
        raw = json.loads(text)
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise EngineMismatch(f"{path} is incomplete or damaged: copy the directory again, or {remedy}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise EngineMismatch(f"{path} has format {version!r}, this program reads {FORMAT_VERSION}: {remedy}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise EngineMismatch(f"{path} is not a valid manifest: {first_problem(error)}: {remedy}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def digest_file(path: Path) -> FileDigest:
    """Return name, size and SHA-256 of a file; reads it in pieces. Raises `OSError`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(name=path.name, sha256=digest.hexdigest(), num_bytes=file.tell())


def check_files(directory: Path, manifest: Manifest, *, plans: bool) -> None:
    """Compare the graphs, or the plans, with the digests in the manifest.

    Sizes are compared before digests, because a plan can have a gigabyte. Raises `EngineMismatch`.
    """
    parts = manifest.graphs.values()
    wanted = [part.plan for part in parts] if plans else [each for part in parts for each in (part.onnx, part.weights)]
    for expected in filter(None, wanted):
        path = directory / expected.name
        try:
            num_bytes = path.stat().st_size
            is_same = num_bytes == expected.num_bytes and digest_file(path) == expected
        except OSError as error:
            raise EngineMismatch(f"{path} cannot be read ({error.strerror}): {rebuild_advice(manifest)}") from error
        if num_bytes != expected.num_bytes:
            raise EngineMismatch(
                f"{path} has {num_bytes:,} bytes, the manifest says {expected.num_bytes:,}: the file was copied "
                f"incompletely or replaced: {rebuild_advice(manifest)}"
            )
        if not is_same:
            raise EngineMismatch(
                f"{path} differs from the file that the manifest describes: {rebuild_advice(manifest)}"
            )


def rebuild_command(manifest: Manifest) -> str:
    """Return the command that builds an engine with the same options, for another checkpoint or machine."""
    return shlex.join(["python", "-m", "trt.build", "CHECKPOINT", "--out", "DIR", *manifest.options.as_arguments()])


def rebuild_advice(manifest: Manifest) -> str:
    """Return the advice to run `rebuild_command`, as the end of an error message."""
    return f"rebuild it with `{rebuild_command(manifest)}`"
