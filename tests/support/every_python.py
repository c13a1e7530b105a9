"""Runs the tests that need no server on every other Python from 3.11 on that this machine has: `make test-pythons`.

The system's own Python comes first among those of one minor version, because its standard library is often the oldest.
Each version has an environment in a cache folder outside the tree, installed from the same lock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edje" / "pythons"
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
OLDEST, NEWEST = 11, 13
#: Of the interpreter: its version, and whether it can make environments.
PROBE = "import ensurepip, platform, venv; print(platform.python_version())"
NO_SERVER = "not services and not kubernetes and not autoscaling and not tensorrt and not gpu"


def interpreters() -> dict[str, str]:
    """Return the path of one interpreter for each full version, one per minor version."""
    found: dict[str, str] = {}
    for minor in range(OLDEST, NEWEST + 1):
        name = f"python3.{minor}"
        managed = sorted(PYENV.glob(f"versions/3.{minor}.*/bin/{name}"))
        candidates = [
            f"/usr/bin/{name}",
            *(str(Path(folder) / name) for folder in os.get_exec_path()),
            *map(str, managed),
        ]
        for candidate in candidates:
            if shutil.which(candidate) is None:
                continue
            probe = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, check=False)
            if probe.returncode == 0:
                found[probe.stdout.strip()] = candidate
                break
    return found


def environment(version: str, interpreter: str) -> Path:
    """Return the Python of an environment with the locked packages, made once for each version."""
    folder = CACHE / version
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
    uv = Path(sys.executable).with_name("uv")
    sync = [str(uv), "pip", "sync", "--quiet", "--require-hashes", "--python", str(python)]
    locks = [str(ROOT / "requirements" / name) for name in ("everything.txt", "uv.txt")]
    subprocess.run([*sync, *locks], check=True)
    # The project itself, so that its metadata and entry points are there.
    install = [str(uv), "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--python", str(python)]
    subprocess.run([*install, "--editable", str(ROOT)], check=True)
    return python


def main() -> int:
    """Return 1 if the tests fail on one of the versions."""
    tested = ".".join(map(str, sys.version_info[:3]))
    failed = []
    for version, interpreter in interpreters().items():
        if version == tested:
            continue
        print(f"--- Python {version} ({interpreter})", flush=True)
        python = environment(version, interpreter)
        command = [str(python), "-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "4", "-m", NO_SERVER]
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=False).returncode != 0:
            failed.append(version)
    if failed:
        print(f"failed on Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
