"""A rerank worker whose process crashes on certain requests, as a faulty decoder would."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager

from workers.rerank.__main__ import build
from workers.runtime import run_worker
from workers.settings import RerankSettings


@contextmanager
def build_crashing(shared):
    with build(shared) as built:
        accept = built.job.accept

        def dying_accept(record, now):
            if b"os._exit" in (record.value or b""):
                os._exit(9)
            if b"SIGSEGV" in (record.value or b""):
                os.kill(os.getpid(), signal.SIGSEGV)
            accept(record, now)

        built.job.accept = dying_accept
        yield built


if __name__ == "__main__":
    sys.exit(run_worker("rerank", RerankSettings, build_crashing))
