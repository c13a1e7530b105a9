"""Serves a gateway over the in-memory bus while a command runs: `python tests/support/serve_gateway.py COMMAND...`.

The command finds its address in EDJE_GATEWAY and a key in EDJE_KEY. Candidates are ranked in reverse. Ends with the
command's exit status.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local"), str(Path(__file__).parent)]
    from gateway_harness import GatewayBench
    from workers.gateway.api_keys import new_key
    from workers.logs import set_up_logs

    set_up_logs(log_format="console", level="error", secrets=[])
    key, entry = new_key("sdk")
    bench = GatewayBench(options={"api_keys": entry})
    bench.worker.missing = {"gone"}
    try:
        environment = {**os.environ, "EDJE_GATEWAY": f"http://127.0.0.1:{bench.port}", "EDJE_KEY": key}
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
