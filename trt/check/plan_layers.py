"""Reads the layers of a plan from the output of TensorRT's inspector, and counts fused and unfused attention.

Knows the inspector's JSON, and nothing of TensorRT itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: A large plan's file has some megabytes.
_MAX_BYTES = 200_000_000
#: Parts of the names of kernels that compute a whole attention.
_FUSED = ("mha", "fmha", "attention")
_SOFTMAX = "softmax"


class LayersUnreadable(Exception):
    """The inspector's file is missing or invalid."""


class Layer(BaseModel):
    """One layer: a kernel, or several operators that TensorRT's compiler has fused."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = Field(alias="Name")
    kind: str = Field("", alias="LayerType")
    tactic: str = Field("", alias="TacticName")


class _Inspected(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    layers: tuple[Layer | str, ...] = Field(alias="Layers")  # only names if the plan was built without details


@dataclass(frozen=True, slots=True)
class AttentionCount:
    """Layers that compute a whole attention, and layers that compute only its softmax."""

    num_fused: int
    num_unfused: int

    @property
    def summary(self) -> str:
        """A sentence for people. It names layer names as the source, because TensorRT may change them."""
        if self.num_unfused:
            unfused = f"NOT FUSED in {self.num_unfused} layers (a softmax by itself)"
            return f"{unfused}, fused in {self.num_fused}, by their names"
        if self.num_fused:
            return f"fused in {self.num_fused} layers, by their names"
        return "no layer names an attention or a softmax"


def read_layers(path: Path) -> tuple[Layer, ...]:
    """Return the layers in the inspector's file, of all profiles. Raises `LayersUnreadable`."""
    try:
        with path.open("rb") as file:
            inspected = _Inspected.model_validate_json(file.read(_MAX_BYTES))
    except OSError as error:
        raise LayersUnreadable(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise LayersUnreadable(f"{path} is not what TensorRT's inspector writes") from error
    return tuple(Layer(Name=each) if isinstance(each, str) else each for each in inspected.layers)


def attention_in(layers: Sequence[Layer]) -> AttentionCount:
    """Count attention layers by the names of layers and kernels: `_gemm_mha_v2_…`, `fmha_v2_…`, `__myl_…Softmax…`."""
    names = [" ".join((each.name, each.kind, each.tactic)).lower() for each in layers]
    fused = [any(word in each for word in _FUSED) for each in names]
    unfused = [_SOFTMAX in each and not is_fused for each, is_fused in zip(names, fused, strict=True)]
    return AttentionCount(sum(fused), sum(unfused))
