"""An environment with the real Python bindings of TensorRT and CUDA, on a machine that has neither.

Made once per version in a cache outside of the tree: the bindings' wheels, pycuda built over the headers that CUDA's
wheels bring, libraries that export the names the bindings link against and answer that there is no device, and type
stubs. It proves that what the code calls exists; it runs no engine. Knows nothing of the code that is checked.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from deploy_tools import made, needed, run
from skipping import missing

ROOT = Path(__file__).parents[2]
#: Compiled by `make lock`.
REQUIREMENTS = ROOT / "requirements" / "tensorrt.txt"
MAX_REASON_CHARS = 500
HOST_DRIVER = Path(__file__).parent / "host_driver.cpp"
DRIVER = Path(__file__).parent / "no_device.c"
#: Names that the bindings of TensorRT look up in its libraries.
LIBRARIES = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
        "getInferLibVersion",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}
#: Modules that type stubs are written for by what mypy brings; TensorRT's has types to be written by pybind11's own.
INSPECTED = ("pycuda._driver", "pycuda.driver", "pycuda.tools", "cuda.bindings.driver", "cuda.bindings.nvrtc")
#: What the generators write of C++ that is no Python: a keyword as a name, a number at a name's start, an order of
#: arguments that Python does not have, and a type that is Cython's own. And what they do not see: that whatever is a
#: number is an int, that a tuple is taken for dimensions, and that a plan in memory can be read as bytes.
REPAIRS = (
    (r"typing\.SupportsInt", "int"),
    (r"(min|opt|max): Dims", r"\1: Dims | tuple[int, ...]"),
    (r"^class IHostMemory:\n", "class IHostMemory:\n    def __buffer__(self, flags: int) -> memoryview: ...\n"),
    (r"\bin: ", "in_: "),
    (r"^ +\d\w*:.*\n", ""),
    (r"channel_axis: int\)", "channel_axis: int = ...)"),
    (r"_cython_\w+\.cython_function_or_method", "Any"),
    (r"^import _cython_\w+\n", ""),
)


@functools.cache
def bindings() -> Path:
    """Return the environment's folder, made first if it is missing (three minutes on two cores)."""
    needed("g++")
    needed("nm")
    parts = [path.read_bytes() for path in (REQUIREMENTS, DRIVER, Path(__file__))]
    digest = hashlib.sha256(b"".join([*parts, sys.version.encode()])).hexdigest()[:12]
    return made(f"tensorrt-{digest}", _make)


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in this environment with the bindings, the project and the recorded modules to import from."""
    folder = bindings()
    path = ":".join(map(str, (ROOT, ROOT / "tests" / "support", _packages(folder))))
    environment = os.environ | _loader(folder) | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def run_pytest(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests with the bindings, over the libcuda in the folder `driver`."""
    folder = bindings()
    loader = f"{driver}:{_loader(folder)['LD_LIBRARY_PATH']}"
    environment = os.environ | {"LD_LIBRARY_PATH": loader, "PYTHONPATH": str(_packages(folder))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def driver_names() -> list[str]:
    """Return the names of the driver that pycuda calls."""
    return _driver_names(bindings())


def run_mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Check files of the project as `make check` does, and against the types of the bindings."""
    folder = bindings()
    # pycuda and cuda-bindings have no types of their own, and stubs of them no annotations.
    options = ["--untyped-calls-exclude=pycuda", "--untyped-calls-exclude=cuda", f"--cache-dir={folder / 'mypy'}"]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, *arguments],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(folder / "stubs")},
        capture_output=True,
        text=True,
        check=False,
    )


def _make(folder: Path) -> None:
    _uv("venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder))
    blocks = re.split(r"^(?=\S)", REQUIREMENTS.read_text(), flags=re.MULTILINE)
    wheels = "".join(block for block in blocks if not block.startswith("pycuda=="))
    try:
        _install(folder, wheels)
    except AssertionError as error:
        missing(f"no bindings of TensorRT and CUDA to install: {str(error)[-MAX_REASON_CHARS:]}")
    _build_libraries(folder)
    # Over the headers that are there now, which an isolated build would not see.
    toolkit = str(folder / "toolkit")
    _install(
        folder,
        REQUIREMENTS.read_text(),
        CUDA_ROOT=toolkit,
        CPATH=f"{toolkit}/include",
        LIBRARY_PATH=f"{toolkit}/lib64",
    )
    _build_driver(folder)
    _write_stubs(folder)


def _install(folder: Path, requirements: str, **environment: str) -> None:
    lock = folder / "requirements.txt"
    lock.write_text(requirements)
    python = str(folder / "bin" / "python")
    options = ("--quiet", "--require-hashes", "--no-build-isolation", "--python", python)
    _uv("pip", "install", *options, "--requirement", str(lock), **environment)


def _uv(*arguments: str, **environment: str) -> None:
    run([sys.executable, "-m", "uv", *arguments], **environment)


def _build_libraries(folder: Path) -> None:
    """Build the libraries to link against: TensorRT's names, CUDA's headers and a libcuda with one name."""
    lib, lib64 = folder / "lib-none", folder / "toolkit" / "lib64"
    lib.mkdir()
    lib64.mkdir(parents=True)
    for name, symbols in LIBRARIES.items():
        _compile(lib / name, "".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in symbols), name)
    _compile(lib64 / "libcuda.so", "int cuInit(unsigned flags) { return 100; }\n", "libcuda.so.1")
    cuda = _packages(folder) / "nvidia" / "cu13"
    (folder / "toolkit" / "include").symlink_to(os.path.relpath(cuda / "include", folder / "toolkit"))
    (curand,) = cuda.glob("lib/libcurand.so.*")
    (lib64 / "libcurand.so").symlink_to(os.path.relpath(curand, lib64))


def _build_driver(folder: Path) -> None:
    """Build a libcuda with every name that pycuda needs; each function reports that there is no device."""
    source = DRIVER.read_text()
    others = [name for name in _driver_names(folder) if f"{name}(" not in source]
    defined = "".join(f"int {name}(void) {{ return NO_DEVICE; }}\n" for name in others)
    _compile(folder / "lib-none" / "libcuda.so.1", source + defined, "libcuda.so.1")


def _driver_names(folder: Path) -> list[str]:
    (extension,) = _packages(folder).glob("pycuda/_driver*.so")
    listed = run(["nm", "--dynamic", "--undefined-only", str(extension)])
    return sorted(set(re.findall(r"\bcu[A-Z]\w*", listed)))


def _compile(library: Path, source: str, soname: str) -> None:
    path = library.with_suffix(".c")
    path.write_text(source)
    run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(library), str(path)])
    path.unlink()


def _write_stubs(folder: Path) -> None:
    target = folder / "stubs"
    python = str(folder / "bin" / "python")
    run([python, "-m", "pybind11_stubgen", "--output-dir", str(target), "tensorrt_bindings"], **_loader(folder))
    # The package is `tensorrt_bindings`, and `tensorrt` what hands it on.
    (target / "tensorrt").mkdir()
    (target / "tensorrt" / "__init__.pyi").write_text(
        "from tensorrt_bindings import __version__ as __version__\nfrom tensorrt_bindings.tensorrt import *\n"
    )
    modules = [option for module in INSPECTED for option in ("--module", module)]
    options = ("--quiet", "--inspect-mode", "--output", str(target), *modules)
    stubgen = [sys.executable, "-c", "from mypy.stubgen import main; main()", *options]
    run(stubgen, PYTHONPATH=str(_packages(folder)), **_loader(folder))
    for path in target.glob("*/**/*.pyi"):
        text = path.read_text()
        for wrong, right in REPAIRS:
            text = re.sub(wrong, right, text, flags=re.MULTILINE)
        path.write_text(text)


def _packages(folder: Path) -> Path:
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


def _loader(folder: Path) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": f"{folder / 'lib-none'}:{_packages(folder) / 'nvidia' / 'cu13' / 'lib'}"}
