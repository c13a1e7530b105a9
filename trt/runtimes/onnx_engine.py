"""The ONNX runtime: runs an engine directory's graphs in ONNX Runtime on a CPU.

Used for parity with the torch engine before a plan is built, and on machines that have only ONNX Runtime. Batches are
grouped by the plans' length buckets and padded to the longest text of a group. bfloat16 graphs are computed in float32
and rounded after each operator (`trt.runtimes.bf16_rounding`), which is slow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edje.optional import PackageMissing, require_package
from trt.contract import (
    EngineBroken,
    EngineMismatch,
    EngineUnavailable,
    QueryStates,
    check_images,
    check_pairs,
    check_texts,
)
from trt.graphs import GRAPH_NAMES, TEXT_TOKENS, GraphName, graphs_of
from trt.identity import engine_info
from trt.manifest import Manifest, check_files
from trt.slab.host import HostSlab
from trt.slab.layout import SlotLayout

log = logging.getLogger(__name__)

#: ONNX Runtime logs fatal errors only; all others arrive as exceptions.
_LOG_FATAL = 4


@dataclass(frozen=True, slots=True)
class PaddedQueries:
    """The texts of one `encode_queries`, padded to the longest, and their lengths without padding."""

    states: NDArray[Any]  # (Q, T, d)
    lengths: NDArray[np.int32]  # (Q,)


class OnnxEngine:
    """The engine contract over the graphs of an engine directory; plans are not read."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        num_slots: int,
        max_pairs: int,
        max_images: int,
        num_threads: int | None,
    ) -> None:
        """Raises `EngineMismatch` if the graphs differ from the manifest, `EngineUnavailable` without ONNX Runtime."""
        config, options = manifest.config, manifest.options
        check_files(directory, manifest, plans=False)
        self._layout = SlotLayout(options.storage, config.adapter.num_tokens, config.joint.dim)
        self._specs = graphs_of(config, options.storage, options.precision)
        self._sessions = {
            name: _session(directory / manifest.graphs[name].onnx.name, num_threads) for name in GRAPH_NAMES
        }
        self._vocab_size = config.joint.vocab_size
        self._bucket_ends = sorted({each.ranges[TEXT_TOKENS].max for each in manifest.graphs["query"].profiles})
        self.slab = HostSlab(self._layout, num_slots)
        _warn_of_another_version(manifest)
        self.info = engine_info(
            config,
            self._layout,
            runtime="onnx",
            model_digest=manifest.model_digest,
            engine_digest=manifest.engine_digest("onnx"),
            max_images=max_images,
            max_pairs=max_pairs,
            num_slots=num_slots,
        )

    def warm_up(self) -> None:
        """Run one image and one pair: ONNX Runtime compiles nothing for particular shapes."""
        size = self.info.image_size
        self.encode_images(np.zeros((1, 3, size, size), np.uint8))
        if self.info.num_slots:
            self.score_pairs(self.encode_queries([[0, 0]]), np.zeros(1, np.int32), np.zeros(1, np.int32))

    def encode_images(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        check_images(self.info, pixels)
        tokens, pooled = self._run("image", {"pixels": pixels})
        return tokens, pooled

    def encode_queries(self, text_ids: Sequence[Sequence[int]]) -> QueryStates:
        check_texts(self.info, text_ids, self._vocab_size)
        lengths = np.array([len(ids) for ids in text_ids], np.int32)
        longest = int(lengths.max(initial=1))
        if not len(lengths):
            return QueryStates(PaddedQueries(np.zeros((0, longest, self.info.token_dim), np.float32), lengths))
        padded = np.zeros((len(lengths), longest), np.int32)
        for row, ids in zip(padded, text_ids, strict=True):
            row[: len(ids)] = ids
        (states,) = self._run("query", {"text_ids": padded, "text_lengths": lengths})
        return QueryStates(PaddedQueries(states, lengths))

    def score_pairs(
        self,
        queries: QueryStates,
        pair_query: NDArray[np.int32],
        pair_slot: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        encoded = cast(PaddedQueries, queries)
        check_pairs(self.info, pair_query, pair_slot, len(encoded.lengths))
        logits = np.empty(len(pair_query), np.float32)
        buckets = np.searchsorted(self._bucket_ends, encoded.lengths[pair_query])
        for bucket in np.unique(buckets):
            group = np.flatnonzero(buckets == bucket)
            rows, numbers = np.unique(pair_query[group], return_inverse=True)
            lengths = encoded.lengths[rows]
            inputs = {
                "states": encoded.states[rows, : lengths.max()],
                "text_lengths": lengths,
                "pair_query": numbers.astype(np.int32),
                **self._stored(pair_slot[group]),
            }
            (logits[group],) = self._run("pair", inputs)
        return logits

    def _stored(self, slots: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """Return the slots' tokens and scales in the shapes and types of the pair graph's inputs."""
        found = {"tokens": self.slab.tokens[slots], "scales": self.slab.scales[slots]}
        stored = {}
        for spec in self._specs["pair"].inputs:
            if spec.name in found:
                shape = spec.sized({"pairs": len(slots)})
                stored[spec.name] = _typed(found[spec.name], spec.dtype).reshape(shape)
        return stored

    def _run(self, name: GraphName, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        wanted = {each.name: inputs[each.name] for each in self._specs[name].inputs}
        try:
            return self._sessions[name].run(None, wanted)  # type: ignore[no-any-return]
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise EngineBroken(f"ONNX Runtime failed in the {name} graph: {str(error)[:300]}") from error


def _warn_of_another_version(manifest: Manifest) -> None:
    """Warn if this ONNX Runtime is not the version that was compared with torch and is in the engine digest."""
    built, here = manifest.versions.get("onnxruntime"), require_package("onnxruntime", "build").__version__
    if built != here:
        log.warning(
            "this engine was compared with torch in ONNX Runtime %s and runs in %s: logits may differ by rounding; "
            "rebuild it on this machine for a digest of this version",
            built,
            here,
        )


def _session(path: Path, num_threads: int | None) -> Any:
    """Open a graph; a bfloat16 graph is converted to float32 first."""
    try:
        runtime, onnx = require_package("onnxruntime", "build"), require_package("onnx", "build")
    except PackageMissing as error:
        raise EngineUnavailable(f"the onnx engine needs ONNX Runtime: {error}") from error
    from trt.runtimes.bf16_rounding import has_bfloat16, round_to_bfloat16

    options = runtime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not has_bfloat16(model):
            return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        onnx.load_external_data_for_model(model, str(path.parent))
        converted = round_to_bfloat16(model).SerializeToString()
        return runtime.InferenceSession(converted, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of protobuf and ONNX Runtime have no common base
        raise EngineMismatch(
            f"ONNX Runtime cannot open {path}: {str(error)[:300]}: export it again with `python -m trt.build`"
        ) from error


def _typed(stored: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Return the bytes of a slab as numbers; bfloat16, which numpy lacks, as float32."""
    if dtype == "bfloat16":
        return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.view(dtype)
