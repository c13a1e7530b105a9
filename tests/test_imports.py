"""Which folder may import which, and which files alone may import a client or an accelerator."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: A folder may import itself and these; a dotted name allows that module and no other of its package.
MAY_IMPORT = {
    "protocols": set(),
    # evaluation judges images as they are stored
    "edje": {"protocols.quantize", "protocols.blob", "protocols.validation"},
    # engines are compared on tokens as they are stored
    "trt": {"edje", "protocols.quantize", "protocols.validation"},
    "workers": {
        "protocols",
        "trt",
        "edje.text",
        "edje.images",
        "edje.checkpoint",
        "edje.first_stage_scores",
        "edje.calibration",
        "edje.first_stage",
        "edje.first_stage.base",
        "edje.first_stage.load",
    },
}
#: Each of these third parties is met in the named files and nowhere else.
ONLY_IN = {
    "kafka": "workers/bus/",
    "redis": "workers/store/",
    "psycopg": "workers/index/client.py",
    "pgvector": "workers/index/client.py",
}
#: The modules that put a program together, and so alone say which adapter stands behind a port.
ROOTS = {
    f"workers/{name}.py"
    for name in (
        "runtime",
        "connect",
        "client",
        "publish/__main__",
        "publish/backfill_command",
        "index/__main__",
        "gateway/replica",
    )
}
ADAPTERS = {f"workers.bus.{name}" for name in ("consumer", "producer", "transactions", "reader", "follower")} | {
    "workers.store.client",
    "workers.index.client",
}
#: The two workers and what they share: neither knows the other, and what they share knows neither.
WORKERS = ("ingest", "rerank", "index", "gateway")
#: The gateway searches the index that the index worker writes.
USERS = {"index": ("workers/index/", "workers/gateway/")}
HEAVY = ["kafka", "redis", "tensorrt", "pycuda", "torch"]
MAX_MODULES_PER_FOLDER = 25


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth, as `package.module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from edje import text` and `from edje.text import Tokenizer` name the same module.
            is_ours = node.module in MAY_IMPORT
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_ours else {node.module}
    return found


SOURCES = {
    str(path.relative_to(ROOT)): imports_of(path)
    for package in MAY_IMPORT
    for path in sorted(ROOT.glob(f"{package}/**/*.py"))
}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def module_edges() -> set[tuple[str, str]]:
    """Every import of one module of ours by another, at any depth of the code, as (importer, imported)."""
    modules = {module_name(path) for path in SOURCES}
    edges = set()
    for path in SOURCES:
        importer = module_name(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                imported = {name if name in modules else node.module for name in names}
            else:
                continue
            edges |= {(importer, name) for name in imported & modules - {importer}}
    return edges


def room_of(module: str) -> str:
    """The folder below the package that a module is in; a module beside the folders is a room by itself."""
    is_in_folder = not (ROOT / f"{module.replace('.', '/')}.py").exists() or module.count(".") > 1
    return ".".join(module.split(".")[:2]) if is_in_folder else module


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """The modules or rooms that lead back to themselves, after all that lead nowhere else are removed."""
    edges = {edge for edge in edges if edge[0] != edge[1]}
    while True:
        importers, imported = {edge[0] for edge in edges}, {edge[1] for edge in edges}
        inner = {edge for edge in edges if edge[0] in imported and edge[1] in importers}
        if inner == edges:
            return sorted(map(list, edges))
        edges = inner


def importers_of(*packages: str) -> set[str]:
    return {path for path, names in SOURCES.items() if any(name.split(".")[0] in packages for name in names)}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_stands_below_it(folder):
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{path} imports {name}"
        for path, names in SOURCES.items()
        for name in sorted(names)
        if path.startswith(f"{folder}/") and name.split(".")[0] in MAY_IMPORT
        if not {name, name.split(".")[0]} & allowed
    ]

    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(module_edges()) == []


def test_no_folders_import_each_other_in_a_circle():
    rooms = {(room_of(importer), room_of(imported)) for importer, imported in module_edges()}

    assert circles(rooms) == []


def test_a_circle_of_imports_is_found_through_other_modules():
    assert circles({("a", "b"), ("b", "c"), ("c", "d")}) == []
    assert circles({("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")}) == [["b", "c"], ["c", "b"]]


@pytest.mark.parametrize(
    ("module", "room"),
    [
        ("edje.layers", "edje.layers"),
        ("edje.towers.base", "edje.towers"),
        ("edje.towers", "edje.towers"),
        ("edje.data.scenes.world", "edje.data"),
    ],
)
def test_a_room_is_a_folder_or_a_module_beside_the_folders(module, room):
    assert room_of(module) == room


def test_no_folder_holds_more_modules_than_one_can_overlook():
    folders = Counter(str(Path(path).parent) for path in SOURCES if not path.endswith("__init__.py"))

    assert {folder: number for folder, number in folders.items() if number > MAX_MODULES_PER_FOLDER} == {}


@pytest.mark.parametrize("client", ONLY_IN)
def test_only_its_adapter_imports_a_client(client):
    assert [path for path in importers_of(client) if not path.startswith(ONLY_IN[client])] == []


def test_only_composition_roots_name_an_adapter():
    naming = {path for path, names in SOURCES.items() if names & ADAPTERS and not path.startswith("workers/bus/")}

    assert naming <= ROOTS


def test_what_records_and_exports_stays_behind_the_tracer():
    importers = {
        path
        for path, names in SOURCES.items()
        if any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in names)
    }

    assert importers
    assert [path for path in importers if not path.startswith("workers/telemetry/")] == []


def test_the_names_of_telemetry_know_nothing_of_the_rest():
    ours = {name for name in SOURCES["workers/telemetry/names.py"] if name.split(".")[0] in MAY_IMPORT}

    assert ours == set()


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_is_known_to_itself_alone(worker):
    inside = USERS.get(worker, (f"workers/{worker}/",))
    outside = [
        path
        for path, names in SOURCES.items()
        if not path.startswith(inside) and any(name.startswith(f"workers.{worker}") for name in names)
    ]

    assert outside == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("tensorrt", ("trt/runtimes/tensorrt_", "trt/build/plan")),
        ("pycuda", ("trt/cuda/", "trt/slab/device", "trt/runtimes/tensorrt_")),
        ("cuda", ("trt/cuda/",)),
    ],
)
def test_the_device_libraries_stay_in_the_modules_named_after_them(library, allowed):
    assert [path for path in importers_of(library) if not path.startswith(allowed)] == []


def test_torch_stays_below_the_engine_contract():
    assert {path.split("/")[0] for path in importers_of("torch")} <= {"edje", "trt"}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_package_that_is_imported_is_declared(folder):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for name in ("gpu", "train", "build", "s3", "gs", "parquet", "heic") for line in extras[name]),
    ]
    # pydantic-core comes with pydantic, in the one version that fits; who changes the contract has pyyaml from `dev`.
    declared = {re.match(r"[a-z0-9-]+", line.lower())[0] for line in lines} | {"pydantic-core", "pyyaml"}
    ours_and_standard = sys.stdlib_module_names | MAY_IMPORT.keys()
    imported = {
        name.split(".")[0] for path, names in SOURCES.items() if path.startswith(f"{folder}/") for name in names
    }
    distributions = {"cuda": ["cuda-bindings"], **packages_distributions()}  # which comes with torch's CUDA build alone

    missing = [
        name
        for name in sorted(imported - ours_and_standard)
        if not {each.lower().replace("_", "-") for each in distributions.get(name, [name])} & declared
    ]

    assert missing == []


def test_no_module_is_named_after_a_dependency():
    assert {Path(path).stem for path in SOURCES} & {
        "kafka",
        "msgpack",
        "pydantic",
        "redis",
        "tokenizers",
        *HEAVY,
    } == set()


@pytest.mark.parametrize(
    "modules",
    [
        "protocols.events, protocols.blob",
        "edje.text, edje.images, edje.checkpoint",
        "trt.contract, trt.load, trt.runtimes.constant_engine",
    ],
)
def test_what_the_hot_path_and_the_constant_engine_need_loads_nothing_heavy(modules):
    script = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
