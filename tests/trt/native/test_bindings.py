"""The TensorRT runtime against the real bindings of TensorRT and CUDA, on a machine that has neither."""

import json

import pytest

from bindings_environment import ROOT, run_mypy, run_python

#: The environment is built by the first test that asks for it.
pytestmark = [pytest.mark.tensorrt, pytest.mark.timeout(1800)]

#: The modules that import the bindings, and those that use them through these.
CHECKED = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        "cuda/*.py",
        "slab/device.py",
        "runtimes/tensorrt_*.py",
        "build/plan_builder.py",
        "build/tensorrt_compiler.py",
    )
    for path in (ROOT / "trt").glob(pattern)
)

#: Walks the recorded modules beside the real ones and prints what only the former have.
COMPARE = r"""
import importlib, inspect, json, re, sys

import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
NAMES = ("pycuda.driver", "pycuda.tools", "cuda.bindings.driver", "cuda.bindings.nvrtc", "tensorrt")
real = {name: importlib.import_module(name) for name in NAMES}

from recording_builder import Recorder, with_builder
from recording_cuda import Gpu, cuda_modules
from recording_tensorrt import tensorrt_module

recorded = {**cuda_modules(Gpu()), "tensorrt": with_builder(tensorrt_module(Gpu(), None), Recorder())}
missing, compared = [], 0


def public(members):
    return {name: each for name, each in members.items() if not name.startswith("_") or name == "__version__"}


def parameters(function, owner):
    '''Names of the parameters of a function, without the object that a method is of.'''
    return list(inspect.signature(function).parameters)[1 if isinstance(owner, type) else 0 :]


def told(function):
    '''For each overload that the real docstring tells, its parameters' names; None where it tells none.'''
    lines = re.findall(r"^\s*(?:\d+\. )?\w+\((.*)\) ?(?:->.*)?:?$", function.__doc__ or "", flags=re.MULTILINE)
    found = []
    for line in lines:
        plain = re.sub(r"\[[^\[\]]*\]|<[^<>]*>", "", line.replace("[,", ",").replace("[", "").replace("]", ""))
        names = [re.sub(r"^\(\w+\)|[:=].*$", "", part.strip()) for part in plain.split(",")]
        found.append([name for name in names if name not in ("self", "*args", "**kwargs", "")])
    return found or None


def compare(path, one, other):
    global compared
    for name, each in public(vars(one)).items():
        if isinstance(other, type) and name in getattr(one, "__annotations__", {}):
            continue
        compared += 1
        there = getattr(other, name, None)
        where = f"{path}.{name}"
        if not hasattr(other, name):
            missing.append(where)
        elif isinstance(each, type):
            compare(where, each, there)
        elif inspect.isfunction(each):
            here = parameters(each, one)
            if path.startswith("cuda"):
                fits, named = here == parameters(there, other), there
            elif path.startswith("tensorrt"):
                named = told(there)
                fits = named is None or any(overload[: len(here)] == here for overload in named)
            else:  # of C++, whose docstrings do not name every parameter
                named = told(there)
                fits = named is None or any(len(overload) >= len(here) for overload in named)
            if not fits:
                missing.append(f"{where}({', '.join(here)}), but {named}")


for name in NAMES:
    compare(name, recorded[name], real[name])
print(json.dumps({"missing": missing, "compared": compared}))
"""


def answer_of(script):
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_that_the_recorded_modules_offer_is_in_the_real_ones():
    answer = answer_of(COMPARE)

    assert answer["compared"] > 100
    assert answer["missing"] == []


def test_a_recorded_name_or_parameter_that_the_real_ones_lack_is_found():
    wrong = """
recorded["tensorrt"].IExecutionContext.execute_async_v4 = lambda self, stream_handle: True
recorded["tensorrt"].IExecutionContext.execute_async_v3 = lambda self, stream: True
recorded["pycuda.driver"].memcpy_htod_async = lambda dest, src, stream, flags: None
recorded["cuda.bindings.driver"].CUresult.CUDA_ERROR_OF_OURS = 1
"""
    found = answer_of(COMPARE.replace("for name in NAMES:", f"{wrong}\nfor name in NAMES:"))["missing"]

    assert len(found) == 4


def test_all_modules_that_speak_to_the_gpu_load_over_the_real_bindings():
    modules = [path.removesuffix(".py").replace("/", ".") for path in CHECKED]
    script = f"""
import importlib, json, sys, tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
for name in {modules}:
    importlib.import_module(name)
print(json.dumps([name for name in ("torch", "pycuda.autoinit", "pycuda.autoprimaryctx") if name in sys.modules]))
"""

    assert answer_of(script) == []


def test_the_real_driver_bindings_report_a_missing_gpu():
    script = """
import json
from trt.cuda.context import CudaDevice
from trt.contract import EngineUnavailable
try:
    CudaDevice(0)
except EngineUnavailable as error:
    print(json.dumps(str(error)))
"""

    assert "no CUDA-capable device" in answer_of(script)


def test_the_real_tensorrt_bindings_report_a_missing_gpu(tmp_path):
    script = f"""
import json, pathlib, sys, tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from trt.contract import EngineUnavailable
from trt.graphs import GraphSpec
from trt.runtimes.tensorrt_plan import Plan
path = pathlib.Path({str(tmp_path / "no.plan")!r})
path.write_bytes(b"")
try:
    Plan(path, GraphSpec("pair", (), ()), version_compatible=False)
except EngineUnavailable as error:
    print(json.dumps(str(error)))
"""

    assert "TensorRT 11.4" in answer_of(script)


def test_the_calls_are_those_of_the_real_bindings_types():
    done = run_mypy(*CHECKED)

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_call_that_the_bindings_do_not_have_is_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import tensorrt\n\n\ndef build(builder: tensorrt.Builder) -> None:\n    builder.max_batch_size\n")

    done = run_mypy(str(wrong))

    assert 'has no attribute "max_batch_size"' in done.stdout
