"""The row copy's own source: compiled for GPUs by NVRTC, and run as C++ with a loop for each thread."""

import ctypes
import importlib
import shutil
import subprocess

import numpy as np
import pytest

from recorded_engine import recorded_modules
from recording_cuda import Gpu
from skipping import missing

#: What CUDA adds to C++, as far as the source uses it; the grid's threads run one after the other.
AS_CPP = r"""
#include <cstddef>
struct uint4 { unsigned int x, y, z, w; };
struct Place { int x, y; };
static Place blockIdx, threadIdx, blockDim, gridDim;
#define __device__ static
#define __global__
%s
#define RUN(bytes)                                                                                              \
    extern "C" void run_##bytes(                                                                                \
        int grid_x, int grid_y, int threads, size_t source, size_t target, size_t from, size_t to, int num_rows, \
        int row_vectors)                                                                                        \
    {                                                                                                           \
        gridDim = {grid_x, grid_y};                                                                             \
        blockDim = {threads, 1};                                                                                \
        for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)                                                 \
            for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++)                                             \
                for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)                                     \
                    copy_rows_##bytes(                                                                          \
                        (decltype(kind_##bytes) *)source, (decltype(kind_##bytes) *)target, (const int *)from,   \
                        (const int *)to, num_rows, row_vectors);                                                \
    }
static uint4 kind_16;
static unsigned int kind_4;
static unsigned char kind_1;
RUN(16)
RUN(4)
RUN(1)
"""


@pytest.fixture(scope="module")
def source():
    with recorded_modules(Gpu()):
        return importlib.import_module("trt.cuda.kernels").COPY_ROWS


@pytest.fixture(scope="module")
def library(source, tmp_path_factory):
    if shutil.which("g++") is None:
        missing("no g++ on this machine")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "copy_rows.cpp").write_text(AS_CPP % source)
    command = ["g++", "-O1", "-shared", "-fPIC", "-o", "copy_rows.so", "copy_rows.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "copy_rows.so"))


def run(library, vector_bytes, grid, source, target, num_rows, source_rows=None, target_rows=None):
    """As the driver would start it with a grid of `grid` blocks of 8 threads."""
    addresses = [None if each is None else each.ctypes.data for each in (source_rows, target_rows)]
    row_vectors = source.shape[1] // vector_bytes
    start = getattr(library, f"run_{vector_bytes}")
    start.argtypes = [ctypes.c_int] * 3 + [ctypes.c_size_t] * 4 + [ctypes.c_int] * 2
    start(*grid, 8, source.ctypes.data, target.ctypes.data, *(each or 0 for each in addresses), num_rows, row_vectors)


@pytest.mark.parametrize("vector_bytes", [16, 4, 1])
@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (7, 5)])
def test_rows_are_gathered_and_scattered_with_every_grid(library, vector_bytes, grid):
    random = np.random.default_rng(0)
    source = random.integers(0, 256, (9, 13 * vector_bytes), dtype=np.uint8)
    rows = np.array([4, 4, 0, 8, 2], np.int32)
    gathered, scattered = np.zeros((5, source.shape[1]), np.uint8), np.zeros_like(source)

    run(library, vector_bytes, grid, source, gathered, 5, source_rows=rows)
    run(library, vector_bytes, grid, source, scattered, 3, target_rows=rows[2:])

    np.testing.assert_array_equal(gathered, source[rows])
    np.testing.assert_array_equal(scattered[rows[2:]], source[:3])
    assert not scattered[[1, 3, 4, 5, 6, 7]].any()


def test_rows_beyond_two_gigabytes_are_reached(library):
    source = np.zeros((35, 1 << 26), np.uint8)  # untouched pages take no memory
    source[33, -16:] = 7
    target = np.zeros((1, 1 << 26), np.uint8)
    last = source[:, -16:]
    address = last.ctypes.data
    start = library.run_16
    start.argtypes = [ctypes.c_int] * 3 + [ctypes.c_size_t] * 4 + [ctypes.c_int] * 2
    rows = np.array([33 * (1 << 22)], np.int32)  # of 16 bytes each

    start(1, 1, 1, address, target.ctypes.data, rows.ctypes.data, 0, 1, 1)

    assert (target[0, :16] == 7).all()


@pytest.mark.parametrize("compute_capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_nvrtc_compiles_it_for_every_gpu_of_the_last_years(compute_capability):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    with recorded_modules(Gpu()):
        kernels = importlib.import_module("trt.cuda.kernels")
    kernels.nvrtc = nvrtc

    code = kernels.compiled(kernels.COPY_ROWS, compute_capability)

    assert code.startswith(b"\x7fELF")
    assert all(b"copy_rows_%d" % size in code for size in kernels.VECTOR_BYTES)
