"""`make search`: starts all servers, workers and the gateway, indexes pictures and serves a page to search them.

    python deploy/local/search.py
    IMAGES=~/holiday CHECKPOINT=~/model QUERIES="a dog;a beach" python deploy/local/search.py

Without IMAGES it draws 500 scenes that the shipped model was trained for. Prints the address of the page and runs until
Ctrl-C, which stops and removes everything that it started. Exits with 1 and an error message if a step fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import urlopen

from rich.console import Console
from rich.text import Text

from demo_choices import Choices
from demo_pictures import Pictures
from demo_topics import fresh_topics
from demo_workers import Worker, explaining, start_all, stop_all, workers_of
from edje.checkpoint import CheckpointError, read_digest
from protocols.topics import Topics
from server_process import ServiceError, free_port
from services import Services
from workers.errors import WorkerError
from workers.publish.__main__ import connection

ROOT = Path(__file__).resolve().parents[2]
#: Port of the page, if it is free.
USUAL_PORT = 8000
NUM_SCENES = 500
#: Queries that the page offers.
NUM_EXAMPLES = 6
SLAB_BYTES = 256 << 20
#: How long the index may take after the ingest worker has published the images.
INDEX_LIMIT_S = 600.0
POLL_S = 0.5

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    # SIGTERM ends the search as Ctrl-C does: everything that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run(Choices.of(os.environ))
    except (ServiceError, WorkerError, CheckpointError) as error:
        console.print(f"\nThe search failed: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped; everything that was started is removed.")
        return 0
    return 0


def run(choices: Choices) -> None:
    """Start everything, index the pictures, and wait until a worker ends or the user interrupts."""
    choices.check_search()
    topics = Topics(f"search-{uuid.uuid4().hex[:6]}.")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edje-search-")))
        services = stack.enter_context(Services())
        helper = stack.enter_context(ThreadPoolExecutor(1))
        with step("Kafka (downloaded once, 43 MB), Redis, PostgreSQL, pictures"):
            addresses = helper.submit(lambda: (services.brokers, services.redis_url, services.database_url))
            pictures = choices.pictures_to_search(scratch / "pictures", NUM_SCENES)
            brokers, redis_url, database_url = addresses.result()
        port = page_port()
        common = {"KAFKA_BROKERS": brokers, "REDIS_URL": redis_url, "DATABASE_URL": database_url}
        settings = settings_of(choices, pictures, port, scratch)
        workers = workers_of(ROOT / "Procfile", common, settings, topics.prefix, scratch)
        digest = read_digest(choices.checkpoint)
        groups = [f"{topics.prefix}ingest", f"{topics.prefix}rerank", f"{topics.prefix}index-{digest}"]
        stack.enter_context(fresh_topics(connection(brokers), topics, groups))
        with step(f"Workers that Procfile names: {', '.join(worker.name for worker in workers)}"):
            stack.callback(stop_all, workers)
            start_all(workers)
        with explaining(workers):
            began = time.monotonic()
            publish(pictures, brokers, topics.prefix)
            wait_for_index(len(pictures.files), port)
            console.print(f"  {len(pictures.files)} images encoded and indexed: {time.monotonic() - began:.1f} s")
        tell(choices, pictures, port, topics.prefix, common)
        watch(workers)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show a spinner while the block runs, then the time it took."""
    began = time.monotonic()
    with console.status(Text(what)):
        yield
    console.print(f"  {what}: {time.monotonic() - began:.1f} s")


def settings_of(choices: Choices, pictures: Pictures, port: int, scratch: Path) -> dict[str, dict[str, str]]:
    """Return the settings of each worker, without the worker's name as prefix."""
    checkpoint = {"CHECKPOINT": str(choices.checkpoint)}
    engine = {**checkpoint, "NUM_THREADS": "1"}
    spans = {name: str(scratch / f"{name}-spans.jsonl") for name in ("rerank", "gateway")}
    return {
        "ingest": {
            **engine,
            "ALLOWED_SCHEMES": "file",
            "FILE_ROOTS": str(pictures.folder.resolve()),
            "PUBLISH_EMBEDDING": "true",
            "THUMBNAILS": "true",
        },
        "rerank": {**engine, "SLAB_BYTES": str(SLAB_BYTES), "SPAN_FILE": spans["rerank"]},
        "index": checkpoint,
        "gateway": {
            **checkpoint,
            "PORT": str(port),
            "EXAMPLES": ";".join(list(pictures.queries)[:NUM_EXAMPLES]),
            "SPAN_FILE": spans["gateway"],
            "TRACE_FILES": ",".join(spans.values()),
        },
    }


def page_port() -> int:
    """Return the usual port if it is free, any free one otherwise."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", USUAL_PORT))
        except OSError:
            return free_port()
    return USUAL_PORT


def publish(pictures: Pictures, brokers: str, prefix: str) -> None:
    """Publish the pictures with the user's command, and wait until they are encoded."""
    command = [sys.executable, "-m", "workers.publish", "images", str(pictures.folder), "--wait", "--keep-extension"]
    command += ["--brokers", brokers, "--topic-prefix", prefix]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        console.print("  not every image could be encoded; the lines above name them")


def wait_for_index(num_images: int, port: int) -> None:
    """Wait until the gateway reports this many images, or the number stops growing: some may have failed."""
    give_up_at = time.monotonic() + INDEX_LIMIT_S
    present, quiet_since = -1, time.monotonic()
    while True:
        with urlopen(f"http://127.0.0.1:{port}/v1/info", timeout=10) as answer:
            info = json.load(answer)
        now = time.monotonic()
        if info.get("num_images", 0) != present:
            present, quiet_since = info.get("num_images", 0), now
        if present >= num_images or (present > 0 and now - quiet_since > 10):
            return
        if now > give_up_at:
            raise ServiceError(
                f"the index has {present} of {num_images} images: {info.get('problem', 'the reason is unknown')}"
            )
        time.sleep(POLL_S)


def tell(choices: Choices, pictures: Pictures, port: int, prefix: str, common: Mapping[str, str]) -> None:
    """Print the address of the page and commands to try."""
    address = f"http://127.0.0.1:{port}"
    caveat = choices.caveat()
    console.print(f"\nSearch {pictures.origin}:\n\n    {address}\n")
    if caveat is not None:
        console.print(caveat.headline + "\n")
    query = next(iter(pictures.queries), "a dog")
    console.print("From the command line:")
    console.print(f'    python -m workers.publish search "{query}" --gateway {address}')
    console.print(
        f'    curl {address}/v2/rerank -d \'{{"query": "{query}", "documents": '
        f"{json.dumps([file.image_id for file in pictures.files[:2]])}}}'"
    )
    exports = " ".join(f"{name}={value}" for name, value in common.items())
    console.print(f"The servers: {exports}, topics {prefix}*\n")
    console.print("Ctrl-C ends everything.")


def watch(workers: Sequence[Worker]) -> None:
    """Wait until a worker ends, which is an error."""
    while True:
        for worker in workers:
            problem = worker.problem()
            if problem is not None:
                raise ServiceError(problem)
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
