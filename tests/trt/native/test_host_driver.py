"""The GPU suite's own tests of device memory, on the real pycuda and cuda-bindings over a driver in host memory."""

import importlib
import re
import subprocess

import pytest

from bindings_environment import HOST_DRIVER, ROOT, driver_names, run_pytest
from recorded_engine import recorded_modules
from recording_cuda import Gpu

pytestmark = [pytest.mark.tensorrt, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def host_driver(tmp_path_factory):
    """A folder with the driver, for the loader to find first."""
    folder = tmp_path_factory.mktemp("driver")
    with recorded_modules(Gpu()):
        (folder / "copy_rows.cu").write_text(importlib.import_module("trt.cuda.kernels").COPY_ROWS)
    source = HOST_DRIVER.read_text()
    others = [name for name in driver_names() if not re.search(rf"\b{name}\(", source)]
    unused = "".join(f"API {name}() {{ return INVALID_VALUE; }}\n" for name in others)
    (folder / "host_driver.cpp").write_text(source + unused)
    command = ["g++", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "host_driver.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_gpu_suites_tests_of_device_memory_pass_in_host_memory(host_driver):
    done = run_pytest(host_driver, "-m", "gpu", str(ROOT / "tests" / "trt" / "gpu" / "test_gpu_device.py"))

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1[0-9] passed, 1 skipped", done.stdout), done.stdout  # there are no two gigabytes
