"""Fixtures of `make test-gpu`; a test whose module or device is missing is skipped with its name."""

import importlib

import pytest


def needed(module, remedy):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"no {module} ({error}): {remedy}")


@pytest.fixture(scope="session")
def device():
    """The first GPU, through pycuda."""
    needed("pycuda.driver", "pip install 'edje-rerank[gpu]'")
    needed("cuda.bindings.nvrtc", "pip install 'edje-rerank[gpu]'")
    from trt.contract import EngineUnavailable
    from trt.cuda.context import CudaDevice

    try:
        return CudaDevice(0)
    except EngineUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tensorrt_device(device):
    """The first GPU, where TensorRT is installed too."""
    needed("tensorrt", "pip install 'edje-rerank[gpu]'")
    return device


@pytest.fixture(scope="session")
def torch_cuda():
    torch = needed("torch", "pip install edje-rerank")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: install the driver, and torch's CUDA build")
    return torch.device("cuda")
