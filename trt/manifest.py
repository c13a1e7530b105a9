"""The manifest of an engine directory, which is read before any other file of it.

    manifest.json             this
    image.onnx ...            the three graphs, each with image.onnx.data beside it if its weights are kept apart
    image.plan ...            what TensorRT made of them; absent where only ONNX was asked for
    image.layers.json ...     the plan's layers, as TensorRT's inspector tells them

Knows files, digests and versions; imports no torch, no ONNX and no TensorRT. Everything wrong with a directory is an
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
#: A name in the engine's own directory: no path leads out of it.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileDigest(_Part):
    """Name, SHA-256 and size of a file in the directory."""

    name: FileName
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class GraphFiles(_Part):
    """The files of one graph and the profiles that its plan has, in the plan's order."""

    onnx: FileDigest
    weights: FileDigest | None = None  # beside the graph where it is too large for one file
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
        """The command line that asks for the same: only what differs from the defaults."""
        spoken: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value == field.default:
                continue
            spoken.append(f"--{name.replace('_', '-')}")
            if not isinstance(value, bool):
                spoken.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return spoken


class ParityReport(_Part):
    """How the engine agreed with the torch reference when it was built."""

    runtime: str  # what was compared with torch: "onnx" or "tensorrt"
    pairs_of: str  # what the pairs were, in words
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
        """The model's configuration. Raises `EngineMismatch` for one that this program does not know."""
        try:
            return parse_config(json.dumps(self.model))
        except ValueError as error:
            raise EngineMismatch(
                f"the engine was built from a model that this program does not know: {again(self)}"
            ) from error

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """An engine has all three graphs, plans of all of them or of none, and profiles of the graphs' own sizes."""
        if self.graphs.keys() != DIMENSIONS.keys():
            raise ValueError(f"an engine has the graphs {', '.join(DIMENSIONS)}, not {', '.join(self.graphs)}")
        if {part.plan is not None for part in self.graphs.values()} != {self.built_on is not None}:
            raise ValueError("plans come with where they were built, and for all graphs")
        for name, part in self.graphs.items():
            if not part.profiles or any(each.ranges.keys() != set(DIMENSIONS[name]) for each in part.profiles):
                raise ValueError(f"the profiles of the {name} graph are not of {', '.join(DIMENSIONS[name])}")
        return self

    def engine_digest(self, runtime: Literal["onnx", "tensorrt"], *, fixed_buckets: bool = False) -> str:
        """The digest of everything that can change a score of this directory in a runtime: what every reply carries.

        It depends on the manifest alone, so `python -m trt.inspect` prints the same on every machine.
        """
        details = [self.options.storage, self.options.precision]
        files = [each for _, part in sorted(self.graphs.items()) for each in (part.onnx, part.weights)]
        if runtime == "onnx":
            details.append(self.versions.get("onnxruntime", ""))
        elif self.built_on is not None:
            details += [self.built_on.tensorrt_version, self.built_on.gpu]
            files += [part.plan for _, part in sorted(self.graphs.items())]
        if fixed_buckets:  # sizes choose kernels, and kernels round
            details.append("fixed buckets")
        return engine_digest(self.model_digest, runtime, *details, *(each.sha256 for each in files if each is not None))

    def engine_digests(self) -> dict[str, str]:
        """The digest of each way in which this directory can be run, by its name."""
        digests = {"onnx": self.engine_digest("onnx")}
        if self.built_on is not None:
            digests["tensorrt"] = self.engine_digest("tensorrt")
            digests["tensorrt, fixed buckets"] = self.engine_digest("tensorrt", fixed_buckets=True)
        return digests


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an engine directory; the files that it names are not looked at (`check_files` does)."""
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
    except ValueError as error:  # of JSON, or bytes that are no text
        raise EngineMismatch(f"{path} is not whole: copy the directory again, or {remedy}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise EngineMismatch(f"{path} has format {version!r}, this program reads {FORMAT_VERSION}: {remedy}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise EngineMismatch(f"{path} is no manifest of this program: {first_problem(error)}: {remedy}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def digest_file(path: Path) -> FileDigest:
    """Name, size and SHA-256 of a file, read in pieces. Raises `OSError`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(name=path.name, sha256=digest.hexdigest(), num_bytes=file.tell())


def check_files(directory: Path, manifest: Manifest, *, plans: bool) -> None:
    """Compare the graphs, or the plans, with the digests in the manifest.

    A file that is too short is told without reading any other; a plan is megabytes to a gigabyte, and is read once.
    """
    parts = manifest.graphs.values()
    wanted = [part.plan for part in parts] if plans else [each for part in parts for each in (part.onnx, part.weights)]
    for expected in filter(None, wanted):
        path = directory / expected.name
        try:
            num_bytes = path.stat().st_size
            is_same = num_bytes == expected.num_bytes and digest_file(path) == expected
        except OSError as error:
            raise EngineMismatch(f"{path} cannot be read ({error.strerror}): {again(manifest)}") from error
        if num_bytes != expected.num_bytes:
            raise EngineMismatch(
                f"{path} has {num_bytes:,} bytes, the manifest says {expected.num_bytes:,}: it was copied half or "
                f"replaced: {again(manifest)}"
            )
        if not is_same:
            raise EngineMismatch(f"{path} is not the file that the manifest was written for: {again(manifest)}")


def rebuild_command(manifest: Manifest) -> str:
    """What to type for an engine like this one from another checkpoint, or on another machine."""
    return shlex.join(["python", "-m", "trt.build", "CHECKPOINT", "--out", "DIR", *manifest.options.as_arguments()])


def again(manifest: Manifest) -> str:
    """`rebuild_command`, as the end of a sentence."""
    return f"build it anew with `{rebuild_command(manifest)}`"
