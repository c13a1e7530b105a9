"""`make demo`: pictures through a real Kafka and a real Redis to ranked replies, demo/report.html and a trace.

    python deploy/local/demo.py
    IMAGES=~/holiday CHECKPOINT=~/model KAFKA_BROKERS=kafka.example:9092 REDIS_URL=redis://redis.example:6379/0 \\
        python deploy/local/demo.py

Draws the scenes that the shipped model was trained for, and succeeds only if reranking corrects mistakes of the first
stage. Starts the services, shows every step, and stops them again. Exits with 0, or with 1 and an error message.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from demo_choices import Choices
from demo_first_stage import FirstStage, WordOverlap
from demo_index import published_embeddings
from demo_pictures import Pictures
from demo_rankings import CheckFailed, figures_of, shown
from demo_report import write_report
from demo_requests import Answers, ask_all
from demo_tables import about_the_texts, ranking_table, summary
from demo_topics import fresh_topics
from demo_trace import show_trace
from demo_workers import explaining, start_all, stop_all, workers_of
from edje.checkpoint import CheckpointError
from protocols.topics import Topics
from server_process import ServiceError
from services import Services
from workers.client import connect
from workers.errors import WorkerError
from workers.publish.__main__ import connection

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "demo" / "report.html"
#: The rerank worker's spans, and the waterfall page of one request.
SPANS, TRACE = REPORT.with_name("spans.jsonl"), REPORT.with_name("trace.html")
#: The demo's pictures need a few hundred slots of the slab; the default size is for production.
SLAB_BYTES = 64 << 20

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    # SIGTERM ends the demo as Ctrl-C does: everything that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        run(Choices.of(os.environ))
    except (ServiceError, WorkerError, CheckpointError, CheckFailed) as error:
        console.print(f"\nThe demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything that the demo started is stopped.")
        return 130
    return 0


def run(choices: Choices) -> None:
    started_at = time.monotonic()
    choices.config()  # fails before anything is started if the checkpoint has no configuration
    SPANS.parent.mkdir(exist_ok=True)
    SPANS.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="edje-demo-") as scratch:
        pictures, first_stage, answers = ask(choices, Path(scratch))
        tell(choices, pictures, first_stage, answers, started_at)


def ask(choices: Choices, scratch: Path) -> tuple[Pictures, FirstStage, Answers]:
    """Start everything, index the pictures, ask all questions, stop everything."""
    topics = Topics(f"demo-{uuid.uuid4().hex[:6]}.")
    with ExitStack() as stack:
        services = stack.enter_context(Services())
        helper = stack.enter_context(ThreadPoolExecutor(1))
        with step("Kafka (downloaded once, 43 MB), Redis, pictures"):
            addresses = helper.submit(lambda: (services.brokers, services.redis_url))
            pictures = choices.pictures(scratch / "pictures")
            brokers, redis_url = addresses.result()
        kafka = connection(brokers)
        common = {"KAFKA_BROKERS": brokers, "REDIS_URL": redis_url}
        workers = workers_of(ROOT / "Procfile", common, settings_of(choices, pictures), topics.prefix, scratch)
        groups = [f"{topics.prefix}{worker.name}" for worker in workers]
        stack.enter_context(fresh_topics(kafka, topics, groups))
        with step(f"Workers that Procfile names: {', '.join(worker.name for worker in workers)}"):
            stack.callback(stop_all, workers)
            start_all(workers)
        with explaining(workers):
            console.print(f"  {len(pictures.files)} images to {topics.images_new}, published by another process")
            publish(pictures, brokers, topics.prefix)
            with step("First stage"):
                first_stage = first_stage_of(choices, pictures, kafka, topics)
                questions = pictures.questions(first_stage)
            client = stack.enter_context(connect(kafka, topics, read=[topics.rerank_responses]))
            with step(f"{len(questions)} requests and their replies"):
                return pictures, first_stage, ask_all(client, questions)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show a spinner while the block runs, then the time it took."""
    began = time.monotonic()
    with console.status(Text(what)):
        yield
    console.print(f"  {what}: {time.monotonic() - began:.1f} s")


def settings_of(choices: Choices, pictures: Pictures) -> dict[str, dict[str, str]]:
    """Return the settings of each worker, without the worker's name as prefix."""
    common = {"CHECKPOINT": str(choices.checkpoint), "NUM_THREADS": "1"}
    return {
        "ingest": {
            **common,
            "ALLOWED_SCHEMES": "file",
            "FILE_ROOTS": str(pictures.folder.resolve()),
            "PUBLISH_EMBEDDING": str(choices.searches_vectors()),
        },
        "rerank": {**common, "SLAB_BYTES": str(SLAB_BYTES), "SPAN_FILE": str(SPANS)},
    }


def publish(pictures: Pictures, brokers: str, prefix: str) -> None:
    """Publish the pictures from a separate process, as any producer would, and wait until they are indexed."""
    command = [sys.executable, "-m", "workers.publish", "images", str(pictures.folder), "--wait", "--keep-extension"]
    command += ["--limit", str(len(pictures.files)), "--brokers", brokers, "--topic-prefix", prefix]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise ServiceError("not every image was indexed; the lines above list the images and the reasons")


def first_stage_of(choices: Choices, pictures: Pictures, kafka: Mapping[str, Any], topics: Topics) -> FirstStage:
    """Return the checkpoint's first stage over the published vectors, or else a match of caption words."""
    if not choices.searches_vectors():
        return WordOverlap(pictures.described)
    from demo_dual_encoder import VectorIndex, pooled_here  # torch takes seconds to import

    pooled = published_embeddings(kafka, topics)
    # Redis has tokens of images from an earlier run, so no vectors were published for them now.
    stored_before = {file.image_id: file.path for file in pictures.files if file.image_id not in pooled}
    if stored_before:
        pooled |= pooled_here(choices.checkpoint, stored_before)
    return VectorIndex.load(choices.checkpoint, {file.image_id: pooled[file.image_id] for file in pictures.files})


def tell(choices: Choices, pictures: Pictures, first_stage: FirstStage, answers: Answers, started_at: float) -> None:
    """Print the results and write the report. Raises `CheckFailed` if the shipped model's figures are too low."""
    caveat, figures, rankings = choices.caveat(), figures_of(answers.rankings), shown(answers.rankings)
    for ranking in rankings:
        console.print()
        console.print(ranking_table(ranking, None if caveat is None else caveat.headline))
    took_s = time.monotonic() - started_at
    config = choices.config()
    write_report(
        REPORT,
        rankings=rankings,
        found_by=first_stage.means,
        figures=figures,
        caveat=caveat,
        facts={
            "Pictures": pictures.origin,
            "First stage": f"{first_stage.means}; its best {pictures.num_candidates} were sent",
            "Model": f"{config.name}, digest {answers.model_digest}, {'' if config.trained else 'un'}trained",
            "Engine": answers.engine_digest,
            "Kafka": "the one named by KAFKA_BROKERS" if choices.has_own_kafka else "Apache Kafka, started here",
            "Redis": "the one named by REDIS_URL" if choices.has_own_redis else "redis-server, started here",
            "Whole demo": f"{took_s:.0f} s",
        },
    )
    console.print()
    if figures is not None:
        console.print(summary(figures, pictures.num_candidates, len(pictures.files)))
    for ranking in rankings:
        if (sentence := about_the_texts(ranking)) is not None:
            console.print(sentence)
    console.print("\nThe timings of one of these requests:")
    show_trace(console, SPANS, [answers.request_id_of(ranking) for ranking in rankings], TRACE)
    console.print(f"\nDone in {took_s:.0f} s. The report with the pictures: {REPORT}")
    if choices.has_own_redis:
        console.print(f"The pictures' tokens are still in your Redis, under vt:{answers.model_digest}:*")
    console.print(
        "Your own: IMAGES=folder CAPTIONS=captions.csv CHECKPOINT=folder make demo, or QUERIES='a dog;a beach' for "
        "CAPTIONS; a page to search on: make search"
    )
    problem = None if figures is None or not choices.is_checked() else figures.problem()
    if problem is not None:
        raise CheckFailed(problem)


if __name__ == "__main__":
    sys.exit(main())
