"""Vision towers that are ONNX graphs. ONNX Runtime runs them on the CPU, also if the model is on another device."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from edje.optional import require_package
from edje.tower_config import OnnxVisionConfig
from edje.towers.base import FrozenTower, TowerError

_TOKENS, _POOLED = "tokens", "pooled"
#: ONNX Runtime logs nothing below this severity; errors are raised as exceptions.
_LOG_FATAL = 4


class OnnxTower(FrozenTower):
    """Returns the graph's output `tokens`, and its `pooled` or the mean of the tokens. No gradient passes."""

    def __init__(self, config: OnnxVisionConfig, image_size: int, graph: bytes) -> None:
        super().__init__(config, image_size)
        self.graph = graph
        self._run = OnnxRunner(graph)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, E)
        return self._checked(*self._run(pixels))


class OnnxRunner:
    """An open ONNX graph. `image_size` is the required size of images, None if the graph accepts any size."""

    def __init__(self, graph: bytes) -> None:
        onnxruntime = require_package("onnxruntime", "train")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        options.intra_op_num_threads = torch.get_num_threads()
        # By default external weights are read from the working directory; no graph may depend on that.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            if "external" in str(error).lower():
                raise TowerError(
                    "the ONNX graph keeps its weights in another file (external data): save it as one file, with "
                    "onnx.save(onnx.load(PATH), NEW_PATH)"
                ) from error
            raise TowerError(f"ONNX Runtime cannot open the graph: {str(error)[:300]}") from error
        self._input, self.image_size = _pixel_input(self._session.get_inputs())
        names = [output.name for output in self._session.get_outputs()]
        if _TOKENS not in names:
            raise TowerError(
                f"the ONNX graph has the outputs {', '.join(names)} and none named {_TOKENS!r}: rename the output with "
                "the patch tokens"
            )
        self._outputs = [name for name in (_TOKENS, _POOLED) if name in names]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, E)
        """Patch tokens and pooled embedding. Raises `TowerError`."""
        images = pixels.detach().to("cpu", torch.float32).numpy()
        try:
            outputs = self._session.run(self._outputs, {self._input: images})
        except Exception as error:  # as above
            raise TowerError(f"ONNX Runtime cannot run the graph on {images.shape}: {str(error)[:300]}") from error
        tokens, *rest = (torch.from_numpy(output).to(pixels.device) for output in outputs)
        if tokens.ndim != 3:
            raise TowerError(f"the ONNX graph's {_TOKENS!r} has {tokens.ndim} axes; expected images, tokens, width")
        return tokens, rest[0] if rest else tokens.mean(dim=1)


def _pixel_input(inputs: list[Any]) -> tuple[str, int | None]:
    """Name and image size of the only input: float32 images, channels first, in batches of any size."""
    described = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
    shape: list[Any] = inputs[0].shape if len(inputs) == 1 and inputs[0].type == "tensor(float)" else []
    if len(shape) != 4 or shape[1] != 3 or isinstance(shape[0], int):
        raise TowerError(
            f"the ONNX graph takes {described}; expected one fp32 input of images, channels first, with an open "
            "number of images, like ['N', 3, 224, 224]: export it with this input"
        )
    sides = {side for side in shape[2:] if isinstance(side, int)}
    if len(sides) > 1:
        raise TowerError(f"the ONNX graph takes {described}; its images must be square")
    return inputs[0].name, next(iter(sides), None)
