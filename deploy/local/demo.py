"""`make demo`: photographs through a real Kafka and a real Redis to ranked replies, and demo/report.html.

    python deploy/local/demo.py
    IMAGES=~/holiday KAFKA_BROKERS=kafka.example:9092 REDIS_URL=redis://redis.example:6379/0 python deploy/local/demo.py

Starts what is needed, shows every step, stops what it started. Ends with 0, or with 1 and a sentence.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo_first_stage import WordOverlap
from demo_pictures import Pictures, pictures_in, shipped_pictures
from demo_report import Ranked, Ranking, write_report
from demo_topics import fresh_topics
from demo_workers import Worker, parse_procfile
from edje.checkpoint import read_config
from protocols.events import Candidate, Query, RerankRequest
from protocols.topics import Topics
from server_process import ServiceError, tail
from services import Services
from workers.client import Client, Reply, connect
from workers.errors import WorkerError
from workers.publish.__main__ import connection

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "demo" / "report.html"
CACHE = ROOT / "build" / "demo"
NUM_CANDIDATES = 10
REPLY_TIMEOUT_S = 60.0
#: The demo's pictures need a few hundred slots of the slab; the default is made for production.
SLAB_BYTES = 64 << 20

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    # SIGTERM ends the demo as Ctrl-C does: everything that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run()
    except (ServiceError, WorkerError) as error:
        console.print(f"\nThe demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything that the demo started is stopped.")
        return 130
    return 0


def run() -> None:
    started_at = time.monotonic()
    prefix = f"demo-{uuid.uuid4().hex[:6]}."
    topics = Topics(prefix)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edje-demo-")))
        services = stack.enter_context(Services())
        helper = stack.enter_context(ThreadPoolExecutor(1))
        with step("Kafka (downloaded once, 43 MB), Redis, pictures, model"):
            addresses = helper.submit(lambda: (services.brokers, services.redis_url))
            pictures = chosen_pictures()
            checkpoint = untrained_checkpoint()
            brokers, redis_url = addresses.result()
        kafka = connection(brokers)
        workers = workers_of(checkpoint, pictures, brokers, redis_url, prefix, logs)
        stack.enter_context(fresh_topics(kafka, topics, [f"{prefix}{worker.name}" for worker in workers]))
        with step(f"Workers that Procfile names: {', '.join(worker.name for worker in workers)}"):
            stack.callback(stop_all, workers)
            start_all(workers)
        with explaining(workers):
            console.print(f"  {len(pictures.files)} images to {topics.images_new}, published by another process")
            publish(pictures, brokers, prefix)
            client = stack.enter_context(connect(kafka, topics, read=[topics.rerank_responses]))
            with step("Requests and replies"):
                rankings = ask_all(client, pictures)
    trained = read_config(checkpoint).trained
    for ranking, reply in rankings:
        print_ranking(ranking, reply, trained=trained)
    took_s = time.monotonic() - started_at
    first = rankings[0][1].response
    facts = {
        "Pictures": pictures.origin,
        "First stage": f"words that query and caption share, rare ones count more; its best {NUM_CANDIDATES} were sent",
        "Model": f"variant {read_config(checkpoint).name}, digest {first.model}, {'' if trained else 'un'}trained",
        "Engine": first.engine,
        "Kafka": "the one named by KAFKA_BROKERS" if os.environ.get("KAFKA_BROKERS") else "Apache Kafka, started here",
        "Redis": "the one named by REDIS_URL" if os.environ.get("REDIS_URL") else "redis-server, started here",
        "Whole demo": f"{took_s:.0f} s",
    }
    write_report(
        REPORT,
        rankings=[ranking for ranking, _ in rankings],
        trained=trained,
        facts=facts,
        credits=pictures.credits,
    )
    console.print(f"\nDone in {took_s:.0f} s. The same with the pictures: {REPORT}")
    if os.environ.get("REDIS_URL"):
        console.print(f"The pictures' tokens are still in your Redis, under vt:{first.model}:*")
    console.print("With your own: IMAGES=folder KAFKA_BROKERS=host:9092 REDIS_URL=redis://host:6379/0 make demo")


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show that something is under way, and how long it took."""
    began = time.monotonic()
    with console.status(Text(what)):
        yield
    console.print(f"  {what}: {time.monotonic() - began:.1f} s")


def chosen_pictures() -> Pictures:
    folder = os.environ.get("IMAGES")
    return pictures_in(Path(folder).expanduser()) if folder else shipped_pictures(CACHE / "pictures")


def untrained_checkpoint() -> Path:
    """A tiny model with random weights, kept from run to run as long as the model's code stays the same."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "edje").glob("*.py"))))
    checkpoint = CACHE / f"tiny-{code.hexdigest()[:12]}"
    if not checkpoint.exists():
        unfinished = Path(f"{checkpoint}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-m", "edje.init", "tiny", str(unfinished)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServiceError(f"no checkpoint could be made: {done.stderr[-2000:]}")
        unfinished.rename(checkpoint)
    return checkpoint


def workers_of(
    checkpoint: Path, pictures: Pictures, brokers: str, redis_url: str, prefix: str, logs: Path
) -> list[Worker]:
    """Every process of Procfile with its settings; a prefix of its own keeps a borrowed Kafka's topics apart."""
    particular = {
        "ingest": {"ALLOWED_SCHEMES": "file", "FILE_ROOTS": str(pictures.folder.resolve())},
        "rerank": {"SLAB_BYTES": str(SLAB_BYTES)},
    }
    workers = []
    for name, command in parse_procfile((ROOT / "Procfile").read_text()).items():
        settings = {
            "CHECKPOINT": str(checkpoint),
            "TOPIC_PREFIX": prefix,
            "GROUP_ID": f"{prefix}{name}",
            "NUM_THREADS": "1",
            **particular[name],
        }
        ours = {f"{name.upper()}_{setting}": value for setting, value in settings.items()}
        workers.append(Worker(name, command, logs, {"KAFKA_BROKERS": brokers, "REDIS_URL": redis_url, **ours}))
    return workers


def start_all(workers: Sequence[Worker]) -> None:
    """Start all at once, because most of the time goes into imports."""
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            for started in as_completed([pool.submit(worker.start) for worker in workers]):
                started.result()
        except BaseException:
            for worker in workers:
                worker.give_up()
            raise


def stop_all(workers: Sequence[Worker]) -> None:
    with ThreadPoolExecutor(len(workers)) as pool:
        for stopped in [pool.submit(worker.stop) for worker in workers]:
            stopped.result()


@contextmanager
def explaining(workers: Sequence[Worker]) -> Iterator[None]:
    """Add to an error what the workers' logs say of it."""
    try:
        yield
    except (ServiceError, WorkerError) as error:
        problems = [problem for worker in workers if (problem := worker.problem()) is not None]
        problems = problems or [f"the end of {worker.name}'s log:\n{tail(worker.log, 2_000)}" for worker in workers]
        raise ServiceError("\n".join([str(error), *problems])) from error


def publish(pictures: Pictures, brokers: str, prefix: str) -> None:
    """Announce the pictures from a process of its own, as any producer would, and wait until they are indexed."""
    command = [sys.executable, "-m", "workers.publish", "images", str(pictures.folder), "--wait", "--keep-extension"]
    command += ["--limit", str(len(pictures.files)), "--brokers", brokers, "--topic-prefix", prefix]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise ServiceError("not every image was indexed; the lines above say which and why")


def ask_all(client: Client, pictures: Pictures) -> list[tuple[Ranking, Reply]]:
    """Send every request, then take the replies as they come."""
    captions = pictures.captions()
    paths = {file.image_id: file.path for file in pictures.files}
    first_stage = WordOverlap(captions)
    asked = []
    for text in pictures.queries:
        best = first_stage.best(text, NUM_CANDIDATES)
        candidates = [Candidate(image_id=image_id, score=score) for image_id, score in best]
        asked.append((RerankRequest(request_id=new_id(), query=Query(text=text), candidates=candidates), best))
    best = first_stage.best(captions[pictures.image_query], NUM_CANDIDATES)
    texts = [Candidate(text=captions[image_id], id=image_id, score=score) for image_id, score in best]
    image = Query(image_id=pictures.image_query)
    asked.append((RerankRequest(request_id=new_id(), query=image, candidates=texts), best))
    sent = [client.publish_request(request) for request, _ in asked]
    for published in sent:
        published.result(REPLY_TIMEOUT_S)
    rankings = []
    for request, best in asked:
        reply = client.reply_to(request.request_id, REPLY_TIMEOUT_S)
        if reply.response.status != "ok":
            raise ServiceError(f"a request was answered with {reply.response.status}: {reply.response.error}")
        shows_pictures = request.query.text is not None
        ranked = [
            Ranked(
                name=best[result.index][0],
                caption=captions[best[result.index][0]],
                rank=rank,
                rank_before=result.index + 1,
                relevance_score=result.relevance_score,
                path=paths[best[result.index][0]] if shows_pictures else None,
            )
            for rank, result in enumerate(reply.response.results, start=1)
        ]
        title = request.query.text or captions[pictures.image_query]
        picture = None if shows_pictures else paths[pictures.image_query]
        rankings.append((Ranking(title, ranked, reply.response.timings_ms, picture), reply))
    return rankings


def new_id() -> str:
    return f"demo-{uuid.uuid4().hex[:12]}"


def print_ranking(ranking: Ranking, reply: Reply, *, trained: bool) -> None:
    kind = "texts for the image" if ranking.query_picture else "images for the text"
    table = Table(
        "rank",
        "text" if ranking.query_picture else "image",
        "score",
        "before",
        title=Text(f"{kind}: {ranking.query}"),
        caption=None if trained else Text("UNTRAINED weights: this shows that it works, not how well it ranks"),
        title_justify="left",
        caption_justify="left",
    )
    for result in ranking.results:
        score, before = f"{result.relevance_score:.4f}", str(result.rank_before)
        table.add_row(str(result.rank), Text(result.caption), score, before)
    console.print()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
